// One kernel for all steps.
#include "cuda/pointwise_launch.cuh"

namespace rnn::cuda {

#define RNN_LAUNCH(IO)                                                  \
  template const char* launch(int, const ForwardCell<IO>&, Stream);     \
  template const char* launch(int, const ForwardProject<IO>&, Stream);  \
  template const char* launch(int, const BackwardBegin<IO>&, Stream);   \
  template const char* launch(int, const BackwardProject<IO>&, Stream); \
  template const char* launch(int, const BackwardCell<IO>&, Stream);    \
  template const char* launch(int, const BackwardBound<IO>&, Stream);   \
  template const char* launch(int, const BackwardFinish<IO>&, Stream);
RNN_LAUNCH(float)
RNN_LAUNCH(double)
RNN_LAUNCH(BFloat16)
RNN_LAUNCH(Float16)
#undef RNN_LAUNCH

}  // namespace rnn::cuda
