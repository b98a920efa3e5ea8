"""``python -m kdkernels``: see :mod:`kdkernels.doctor`."""

import sys

from kdkernels import doctor

sys.exit(doctor.main())
