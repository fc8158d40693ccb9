// The CPU kernels of one instruction set, behind plain function pointers.
#pragma once

#include "common/cell_library.h"
#include "common/cell_list.h"
#include "common/layout.h"
#include "common/storage.h"
#include "cpu/thread_budget.h"

namespace rnn::cpu {

// Called once with the size of the workspace that the call needs, in bytes; returns memory aligned to 64 bytes.
using Allocate = void* (*)(int64_t bytes, void* context);

struct Launch {
  ThreadBudget& threads;
  Allocate allocate;
  void* context;
};

// What weights are packed in: what products take, or, of float32 layers that save nothing for backward, something
// narrower. int8 is a multiple of a scale that each row of a weight has for itself.
enum class PackedType { kOwn, kBFloat16, kFloat16, kInt8 };

// Where forward packs its weights: in the workspace of the call, or in memory that outlives it. A digest tells whether
// weights are still those that this memory was filled from, whichever way they were written to: digest.h.
struct Packs {
  bool keep = false;
  void* memory = nullptr;  // packed_bytes() bytes, aligned to 64
  bool filled = false;     // by an earlier call of the same sizes
  PackedType type = PackedType::kOwn;
  bool trusted = false;  // filled, and known to be what the weights hold: nobody compares digests
};

// out [rows, units] = a [rows, K] * w [K, units], each row by itself.
template <class IO>
struct Rows {
  int64_t rows, K, units;
  const IO* a;
  int64_t a_stride;
  const IO* w;
  IO* out;
  bool adds;  // to what stands in out
};

// out [M, N] = a^T b of a [K, M] and b [K, N], or out +=, in each lane. Strides are those of rows, and of lanes.
template <class IO>
struct OuterProducts {
  int64_t lanes, K, M, N;
  const IO* a;
  int64_t a_stride, a_lane;
  const IO* b;
  int64_t b_stride, b_lane;
  IO* out;
  int64_t out_stride, out_lane;
  bool adds;  // to what stands in out

  OuterProducts of(int64_t lane) const {
    OuterProducts one = *this;
    one.a += lane * a_lane;
    one.b += lane * b_lane;
    one.out += lane * out_lane;
    return one;
  }
};

// The states of a call, or their tangents: as the loop backwards reads them.
template <class IO>
struct States {
  const IO* h0;     // [D, B, R]
  const IO* c0;     // [D, B, C*H] or null
  const IO* y;      // [T, B, D*R]
  const IO* c;      // [T, B, D, C*H] or null
  const IO* saved;  // [T, B, D, K*H] or null
};

// A loop of tangents (tangent_units.h): x, biases and states are tangents, and so are all results; W_ih, W_hh and W_hr
// are themselves, by which tangents are multiplied as values are.
template <class IO>
struct ForwardTangents : Forward<IO> {
  States<IO> at;
  const IO* of_gx;  // [T, B, D, G*H] or null: what else changes gx: W_ih' x
  const IO* of_gh;  // the same of gh: W_hh' h
  const IO* of_h;   // [T, B, D*R] or null: what else changes the projected h: W_hr' h
};

// A loop of values that writes the gradients of all states behind each step.
template <class IO>
struct BackwardRecord : Backward<IO> {
  IO* dnext;  // [T, B, D, S*H]: that of h before its projection
};

// A loop of tangents: gradients are, given and found ones; weights, states and what was saved are values.
template <class IO>
struct BackwardTangents : Backward<IO> {
  const IO* dnext;  // [T, B, D, S*H]: values, which a BackwardRecord has written
  States<IO> tangents;
  const IO* of_raw;  // [T, B, D, H] or null: what else changes the gradient of h before its projection: W_hr'^T dproj
};

// A normed cell's part in the loops (common/normed.h), each of tile j at a step. v [rows, gates, vectors, lanes] is
// W_hh h; where the cell emits, `forward` leaves its states there, which `emit` takes. Of backward dh came through W_hh
// or W_hr; where the cell emits, emit_backward takes it, else backward.
template <class IO>
struct NormedKernels {
  using T = Arithmetic<IO>;
  void (*forward)(const void* loop, const void* direction, const void* step, int64_t j, T* v);
  void (*emit)(const void* loop, const void* direction, const void* step, int64_t j, const T* v);
  void (*emit_backward)(const void* loop, int64_t d, const void* block, int64_t s, int64_t j, const T* dh);
  void (*backward)(const void* loop, int64_t d, const void* block, int64_t s, int64_t j, const T* dh);
};

// A cell as the kernels of one instruction set and storage type have it: its sizes, and its arithmetic wherever they
// call for it. What loops hand on of themselves has types that are known to code for the same instruction set alone.
template <class IO>
struct CellKernels {
  using T = Arithmetic<IO>;
  CellSizes sizes;
  // The cells of tile j at a step of a ForwardLoop: forward.h.
  void (*forward)(const void* loop, const void* direction, const void* step, int64_t j, const T* gx, const T* gh);
  // The same of a BackwardLoop: backward.h.
  void (*backward)(const void* loop, int64_t d, const void* block, int64_t s, int64_t j, const T* dh);
  // A single step of one direction, T == 1, without lengths, resets, projection and bounds; units first to last. Given
  // gh [B, G*H], W_hh h, it takes W_ih x from gx; else it computes both products, row by row.
  void (*forward_step)(const Forward<IO>&, const IO* gh, int64_t first, int64_t last);
  // Leaves the gradients of gh behind, [B, G*H], and in dh0 what goes around W_hh.
  void (*backward_step)(const Backward<IO>&, T* dgh, int64_t first, int64_t last);
  NormedKernels<IO> normed = {};  // of a normed cell, which has nothing else
  // In the place of forward and backward in a loop over ForwardTangents, BackwardRecord and BackwardTangents; null of
  // 16-bit types, which would be rounded at every step, and of cells that are not built in.
  decltype(forward) forward_tangents = nullptr;
  decltype(backward) backward_record = nullptr, backward_tangents = nullptr;
  bool carries_tangents = false;  // the loop forward is one over ForwardTangents
};

template <class IO>
struct Entry {
  const CellKernels<IO>* cells;  // of AllCells and NormedCells, by number
  // False: the packs are of other values than the weights have now, and no output was written.
  bool (*forward)(const Launch&, const CellKernels<IO>&, const Forward<IO>&, const Packs&);
  int64_t (*packed_bytes)(const CellKernels<IO>&, const Forward<IO>&, PackedType);
  void (*backward)(const Launch&, const CellKernels<IO>&, const Backward<IO>&);
  void (*rows)(const Launch&, const Rows<IO>&);
  void (*outer)(const Launch&, const OuterProducts<IO>&);  // null where torch's are faster
  // out [B, N] = x [B, K] w^T of w [N, K], columns first to last.
  void (*dots)(const IO* x, int64_t B, const IO* w, int64_t N, int64_t K, int64_t first, int64_t last, IO* out);
  // out [R] += a [K] * w [K, R], columns first to last.
  void (*add_product)(const Arithmetic<IO>* a, const IO* w, int64_t K, int64_t R, int64_t first, int64_t last, IO* out);
};

// Units and columns are shared out in multiples of this, which whole vectors divide.
constexpr int64_t kStepUnits = 16;

struct Kernels {
  const char* name;
  Entry<float> float32;
  Entry<double> float64;
  Entry<BFloat16> bfloat16;
  Entry<Float16> float16;
};

// The name of what the library of a cell that is not in AllCells exports; its target is the kernels_name of its types.
constexpr const char* kCellLibrary = "rnnkernels_cell";

// The best that this processor runs, or the one that the environment variable RNNKERNELS_CPU_CAPABILITY names
// (default, avx2, avx512, avx512_bf16, amx). Null where that name is unknown, and where this processor supports none.
const Kernels* kernels();

// The names of all that this build has, commas between them.
const char* kernels_built();

// The name of the kernels in use for bfloat16, which may be others than those for the rest, or for the rest.
const char* kernels_name(bool bfloat16);

// Has this processor instructions that multiply numbers of this type? Other libraries use them.
bool multiplies_bfloat16();
bool multiplies_float16();

}  // namespace rnn::cpu
