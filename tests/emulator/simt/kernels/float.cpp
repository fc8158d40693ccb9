#include "simt/kernels/run.h"

static const rnn::simt::Compiled<float> compiled;
