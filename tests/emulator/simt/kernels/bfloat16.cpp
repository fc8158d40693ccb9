#include "simt/kernels/run.h"

static const rnn::simt::Compiled<rnn::BFloat16> compiled;
