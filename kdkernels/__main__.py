"""``python -m kdkernels``: what was built and which backend would serve a tensor."""

from kdkernels import __version__, dispatch

print(f"kdkernels    {__version__}\n{dispatch.report()}")
