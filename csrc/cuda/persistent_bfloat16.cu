#include "cuda/launch.cuh"

RNN_PERSISTENT(BFloat16)
