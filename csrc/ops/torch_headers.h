// The headers of torch that nearly every file here begins with. setup.py compiles them once, for parsing them takes
// most of the time of such a file; each file still includes what it uses, and compiles without this one.

#include <torch/csrc/autograd/function.h>
#include <torch/library.h>
