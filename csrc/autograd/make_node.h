// How nodes of torch's autograd are made.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "ops/check.h"
#include "ops/tables.h"

namespace rnn {

// torch counts references to its nodes itself from 2.12 on, and left it to std::shared_ptr before.
template <class Node, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<decltype(std::declval<Node&>().getptr()), std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  }
}

// A node's own settings: the caller's texts may not outlive the call.
inline Settings lasting(Settings settings) {
  settings.cell = find_cell(settings.cell).name;
  settings.merge_mode = merge_name(find_merge(settings.merge_mode));
  settings.clip = clip_name(find_clip(settings.clip, settings.bound).kind);
  return settings;
}

// The edge to where a tensor comes from; none for what there is not.
inline torch::autograd::Edge edge_to(const Tensor& t) {
  return t.defined() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge();
}

// The fields of a struct to who compiles a backward.
template <class Struct>
void collect_fields(torch::dynamo::autograd::CompiledNodeArgs& args, const Struct& of) {
  const auto collect = [&]<class T>(const T& value) {
    if constexpr (std::is_same_v<T, c10::string_view>) {
      args.collect(std::string(value));
    } else {
      args.collect(value);
    }
  };
  std::apply([&](const auto&... field) { (collect(of.*field.member), ...); }, Struct::fields());
}

}  // namespace rnn
