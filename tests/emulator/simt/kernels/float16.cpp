#include "simt/kernels/run.h"

static const rnn::simt::Compiled<rnn::Float16> compiled;
