// From a struct to an op: the list of a struct's fields is written once, beside the struct, and the op's schema, its
// registration and its calls follow from it.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace rnn {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
// A list that may be missing. Lists that would be empty are left out: compilers ahead of time (AOTInductor) hand an
// empty one on as if it were missing.
using OptionalList = std::optional<TensorList>;
inline OptionalList given(TensorList list) { return list.empty() ? std::nullopt : OptionalList(list); }
inline TensorList list_of(const OptionalList& list) { return list.value_or(TensorList()); }

template <class Owner, class T>
struct Field {
  const char* name;
  T Owner::* member;
};
template <class Owner, class T>
Field(const char*, T Owner::*) -> Field<Owner, T>;  // Clang before 17 finds none for an aggregate by itself

namespace detail {

// How schemas name a type, and how the dispatcher hands over a value of it.
template <class T>
struct SchemaType;
#define RNN_SCHEMA_TYPE(T, text, argument)    \
  template <>                                 \
  struct SchemaType<T> {                      \
    static constexpr const char* name = text; \
    using Argument = argument;                \
  };
RNN_SCHEMA_TYPE(Tensor, "Tensor", const Tensor&)
RNN_SCHEMA_TYPE(OptionalTensor, "Tensor?", const OptionalTensor&)
RNN_SCHEMA_TYPE(TensorList, "Tensor[]", TensorList)
RNN_SCHEMA_TYPE(OptionalList, "Tensor[]?", const OptionalList&)
RNN_SCHEMA_TYPE(std::vector<Tensor>, "Tensor[]", const std::vector<Tensor>&)
RNN_SCHEMA_TYPE(at::IntArrayRef, "int[]", at::IntArrayRef)
RNN_SCHEMA_TYPE(c10::string_view, "str", c10::string_view)
RNN_SCHEMA_TYPE(int64_t, "int", int64_t)
RNN_SCHEMA_TYPE(double, "float", double)
RNN_SCHEMA_TYPE(bool, "bool", bool)
#undef RNN_SCHEMA_TYPE

// "Tensor y, Tensor h_n": the fields of a struct as schemas list them; `written` names one that an op writes to.
template <class Struct>
std::string listed(std::string_view written = {}) {
  std::string text;
  const auto add = [&]<class Owner, class T>(const Field<Owner, T>& field) {
    std::string type = SchemaType<T>::name;
    if (field.name == written) type.insert(type.find("Tensor") + 6, "(a!)");
    text += (text.empty() ? "" : ", ") + type + " " + field.name;
  };
  std::apply([&](const auto&... field) { (add(field), ...); }, Struct::fields());
  return text;
}

template <class Struct>
auto values(Struct&& of) {
  return std::apply([&](const auto&... field) { return std::make_tuple(std::move(of.*field.member)...); },
                    std::decay_t<Struct>::fields());
}

template <class Tuple>
struct Tail;
template <class First, class... Rest>
struct Tail<std::tuple<First, Rest...>> {
  using type = std::tuple<Rest...>;
};

template <class Call, class Fields>
struct Dispatched;
template <class Call, class... Owner, class... T>
struct Dispatched<Call, std::tuple<Field<Owner, T>...>> {
  template <class Results>
  using Signature = Results(typename SchemaType<T>::Argument...);

  static Call pack(typename SchemaType<T>::Argument... values) {
    Call call;
    std::apply([&](const auto&... field) { ((call.*field.member = values), ...); }, Call::fields());
    return call;
  }
  template <class Results, Results (*run)(Call&)>
  static Results entry(typename SchemaType<T>::Argument... values) {
    Call call = pack(values...);
    return run(call);
  }
  template <class Results, Results (*run)(c10::DispatchKeySet, Call&)>
  static Results entry_with_keys(c10::DispatchKeySet keys, typename SchemaType<T>::Argument... values) {
    Call call = pack(values...);
    return run(keys, call);
  }
};

}  // namespace detail

// An op that takes the fields of Call and returns those of Outputs; where it writes the first of them over one of its
// arguments (kWrites), the others.
template <class Call_, class Outputs_, bool kWrites = false>
struct Op {
  using Call = Call_;
  using Outputs = Outputs_;
  using AllResults = decltype(detail::values(std::declval<Outputs>()));
  using Results = typename std::conditional_t<kWrites, detail::Tail<AllResults>, std::type_identity<AllResults>>::type;
  using Dispatched = detail::Dispatched<Call, decltype(Call::fields())>;
  using Signature = typename Dispatched::template Signature<Results>;
  using Handle = c10::TypedOperatorHandle<Signature>;

  static std::string schema(const std::string& name, std::string_view written = {}) {
    std::string results = detail::listed<Outputs>();
    if (kWrites) results.erase(0, results.find(", ") + 2);
    return name + "(" + detail::listed<Call>(written) + ") -> (" + results + ")";
  }
  static Handle find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Signature>();
  }
  static Results call(const Handle& op, const Call& call) {
    return std::apply([&](const auto&... field) { return op.call(call.*field.member...); }, Call::fields());
  }
  static Results redispatch(const Handle& op, c10::DispatchKeySet keys, const Call& call) {
    return std::apply([&](const auto&... field) { return op.redispatch(keys, call.*field.member...); }, Call::fields());
  }
  static Results results(Outputs&& outputs) {
    AllResults all = detail::values(std::move(outputs));
    if constexpr (kWrites) {
      return std::apply([](auto&, auto&... rest) { return Results(std::move(rest)...); }, all);
    } else {
      return all;
    }
  }
  // The function to register where run(Call&) returns the outputs.
  template <Outputs (*run)(Call&)>
  static Results implementation(Call& call) {
    return results(run(call));
  }
};

}  // namespace rnn
