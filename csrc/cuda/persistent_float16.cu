#include "cuda/launch.cuh"

RNN_PERSISTENT(Float16)
