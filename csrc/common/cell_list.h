// Which cells there are, and how a cell's number leads to its struct.
#pragma once

#include "cells.h"
#include "normed.h"

namespace rnn {

// Every cell there is. A cell's number is its place in this list.
template <class... Cells>
struct CellList {};
using AllCells = CellList<RNNTanh, RNNRelu, RNNSigmoid, LSTM, GRU>;
// Those whose products are normalised, numbered on behind these.
using NormedCells = CellList<NormedLSTM, NormedGRU>;

template <class... Cells>
constexpr int count(CellList<Cells...>) {
  return sizeof...(Cells);
}

constexpr int kBuiltIn = count(AllCells{}) + count(NormedCells{});

// A cell's numbers, for whatever knows them only when it runs.
struct CellSizes {
  int G, S, K, A;
  int P = 0, E = 0;
  bool recurrent = true;  // gates have a hidden part, and there is a W_hh
  bool normed = false;    // normed.h; A and K are then those of the loops: all gates are split
  bool emits = false;
  int alone = 0;  // of a normed cell's gates the last ones, which are normalised by themselves

  template <class Cell>
  static constexpr CellSizes of(Cell) {
    CellSizes sizes{Cell::G, Cell::S, Cell::K, Cell::A};
    if constexpr (requires { Cell::P; }) sizes.P = Cell::P;
    if constexpr (requires { Cell::kRecurrent; }) sizes.recurrent = Cell::kRecurrent;
    if constexpr (requires { Cell::E; }) sizes.E = Cell::E;
    if constexpr (requires { Cell::kNormed; }) {
      sizes.normed = true;
      sizes.emits = Cell::kEmits;
      sizes.alone = Cell::kOwnA;
    }
    return sizes;
  }

  // States beside h.
  constexpr int C() const { return S - 1; }
  // Of a normed cell: how many groups of gates are normalised together, of which the first has the first gates.
  constexpr int groups() const { return normed ? 1 + (alone > 0) : 0; }
  constexpr int first_gate(int group) const { return group == 0 ? 0 : G - alone; }
  constexpr int gates(int group) const { return group == 0 ? G - alone : alone; }
  // Columns of the gradients of a step, H wide each.
  constexpr int columns() const { return G + A; }
};

// Calls f(Cell{}) for the cell with this number; returns false where there is none.
template <class F, class... Cells>
bool dispatch_cell(int number, F&& f, CellList<Cells...>) {
  int i = 0;
  return ((i++ == number ? (f(Cells{}), true) : false) || ...);
}
template <class F>
bool dispatch_cell(int number, F&& f) {
  return dispatch_cell(number, static_cast<F&&>(f), AllCells{});
}

// Calls f(Cell{}) for every cell, in the order of their numbers.
template <class F, class... Cells>
void for_each_cell(F&& f, CellList<Cells...>) {
  (f(Cells{}), ...);
}
template <class F>
void for_each_cell(F&& f) {
  for_each_cell(static_cast<F&&>(f), AllCells{});
}

// Cells of the same numbers of gates and states as one: which of them it is, is said when it runs. A kernel for all
// costs next to nothing where the cell is little of it.
template <class First, class... Others>
struct OneOf {
  static constexpr int G = First::G, S = First::S, K = First::K, A = First::A;
  static_assert(((G == Others::G && S == Others::S && K == Others::K && A == Others::A) && ...));
  using Cells = CellList<First, Others...>;
};
using Elmans = OneOf<RNNTanh, RNNRelu, RNNSigmoid>;

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class Cell, class... Cells>
constexpr bool contains(CellList<Cells...>) {
  return (same<Cell, Cells> || ...);
}
// A cell's place in the list.
template <class Cell, class... Cells>
constexpr int number_of(CellList<Cells...>) {
  int i = 0;
  bool before = true;
  ((before = before && !same<Cell, Cells>, i += before), ...);
  return i;
}

// The arithmetic of a cell, where it may be one of several; `number` is that of the cell.
template <class Cell, class... Arguments>
RNN_HD void cell_forward(Cell, int, Arguments... arguments) {
  Cell::forward(arguments...);
}
template <class Cell, class... Arguments>
RNN_HD void cell_backward(Cell, int, Arguments... arguments) {
  Cell::backward(arguments...);
}
template <class... Cells, class... Arguments>
RNN_HD void cell_forward(OneOf<Cells...>, int number, Arguments... arguments) {
  ((number == number_of<Cells>(AllCells{}) ? Cells::forward(arguments...) : void()), ...);
}
template <class... Cells, class... Arguments>
RNN_HD void cell_backward(OneOf<Cells...>, int number, Arguments... arguments) {
  ((number == number_of<Cells>(AllCells{}) ? Cells::backward(arguments...) : void()), ...);
}

// Calls f(Cell{}) for the cell with this number, or for what it is one of; returns false where there is none.
template <class F>
bool dispatch_cell_or_group(int number, F&& f) {
  return dispatch_cell(number, [&](auto cell) {
    if constexpr (contains<decltype(cell)>(Elmans::Cells{})) {
      f(Elmans{});
    } else {
      f(cell);
    }
  });
}

}  // namespace rnn
