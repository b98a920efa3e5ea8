// What the kernels include. It comes before the instruction set is raised: inline functions of these headers are shared
// by all builds of the kernels, and the linker may keep any copy of them.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "kernels.h"
