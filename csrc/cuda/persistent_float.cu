#include "cuda/launch.cuh"

RNN_PERSISTENT(float)
