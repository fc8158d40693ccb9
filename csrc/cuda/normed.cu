// One kernel for all steps of cells whose products are normalised.
#include "cuda/normed_backward.h"
#include "cuda/pointwise_launch.cuh"

namespace rnn::cuda {

#define RNN_LAUNCH(IO)                                                     \
  template const char* launch(int, const HiddenMoments<IO>&, Stream);      \
  template const char* launch(int, const NormedForwardCell<IO>&, Stream);  \
  template const char* launch(int, const StateMoments<IO>&, Stream);       \
  template const char* launch(int, const ForwardEmit<IO>&, Stream);        \
  template const char* launch(int, const BackwardEmit<IO>&, Stream);       \
  template const char* launch(int, const StateMeans<IO>&, Stream);         \
  template const char* launch(int, const NormedBackwardCell<IO>&, Stream); \
  template const char* launch(int, const HiddenMeans<IO>&, Stream);        \
  template const char* launch(int, const HandOnGates<IO>&, Stream);
RNN_LAUNCH(float)
RNN_LAUNCH(double)
RNN_LAUNCH(BFloat16)
RNN_LAUNCH(Float16)
#undef RNN_LAUNCH

}  // namespace rnn::cuda
