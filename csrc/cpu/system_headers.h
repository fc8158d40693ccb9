// All headers from outside that kernels include. kernels_*.cpp include them before they change the instruction set: a
// function that one of them defines would be compiled for it, and the linker keeps one copy of such a function for all.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <dlfcn.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
