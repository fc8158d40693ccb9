// Forward-mode AD: tensors that carry a tangent.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

#include "ops/fields.h"

namespace rnn {

inline bool has_tangents(TensorList tensors) { return torch::autograd::isFwGradDefinedTensorList(tensors); }

// Gives tensors theirs, where one is defined; there may be more tensors than tangents.
inline void set_tangents(TensorList tensors, const std::vector<Tensor>& tangents) {
  for (size_t i = 0; i < tangents.size(); ++i)
    if (tangents[i].defined()) tensors[i]._set_fw_grad(tangents[i], /*level=*/0, /*is_inplace_op=*/false);
}

}  // namespace rnn
