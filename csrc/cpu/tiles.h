// The product on the matrix unit of AMX-BF16: tiles of 16 rows by 32 bfloat16 times tiles of 32 by 16, added up in
// float32. The order of the additions of a number depends on K alone.
//
// The instructions are written out: the intrinsics of GCC do not tell the compiler that they read memory.
#pragma once

#include "cpu/product.h"

namespace rnn::cpu::RNN_ISA {

template <int tile>
RNN_HD void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
RNN_HD void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
RNN_HD void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int sum, int a, int b>
RNN_HD void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// Around all products of one thread: other libraries have set the unit up for themselves, and must find it released.
class ProductScope {
 public:
  ProductScope() { height_ = 0; }
  ~ProductScope() { asm volatile("tilerelease"); }
  ProductScope(const ProductScope&) = delete;
  ProductScope& operator=(const ProductScope&) = delete;

  // Sums and rows have this height from now on, until the next call. It takes as long as a product of K = 128.
  static void set_rows(int rows) {
    if (rows == height_) return;
    height_ = rows;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = i < kWeights ? uint8_t(rows) : 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }

  // Which tiles are what: sums from 0 on, then one of rows, then weights.
  static constexpr int kRows = 4, kWeights = 5;

 private:
  static inline thread_local int height_ = 0;
};

template <>
struct Products<BFloat16> {
  static constexpr int kHeight = 16;  // fewer rows take a product no less time
  static constexpr int kTwoTiles = 2 * kHeight;
  static constexpr int64_t kBytesTogether = 32 << 10;  // the matrix unit is slow to begin after other instructions

  static int64_t tile_rows(int64_t rows, int) {
    return rows >= kTwoTiles ? kTwoTiles : rows < kHeight ? rows : kHeight;
  }
  static int64_t rest_rows(int64_t rest, int64_t each) { return each == kTwoTiles && rest <= kHeight ? kHeight : each; }

  template <int N>
  static Product<BFloat16> of(int rows) {
    ProductScope::set_rows(rows == kTwoTiles ? kHeight : rows);
    return rows == kTwoTiles ? two_tiles<N> : product<N>;
  }

 private:
  template <int N>
  static void product(const BFloat16* a, int64_t row_stride, const BFloat16* panel, int64_t K, bool continues,
                      float* out, int64_t out_stride, Ahead) {
    constexpr int64_t kPairBytes = N * 64;  // of a pair of values of K in the panel
    const int64_t sum_bytes = out_stride * 4;
    each<N>([&]<int n>() {
      if (continues) {
        load_tile<n>(out + n * 16, sum_bytes);
      } else {
        clear_tile<n>();
      }
    });
    for (int64_t k = 0; k < K; k += 32) {
      load_tile<ProductScope::kRows>(a + k, row_stride * 2);
      each<N>([&]<int n>() {
        constexpr int weights = ProductScope::kWeights + n % 3;
        load_tile<weights>(panel + (k * N + n * 2) * 16, kPairBytes);
        multiply_tiles<n, ProductScope::kRows, weights>();
      });
    }
    each<N>([&]<int n>() { store_tile<n>(out + n * 16, sum_bytes); });
  }

  // The same of two tiles of rows: a [2*16, K], out [2*16, N*16].
  template <int N>
  static void two_tiles(const BFloat16* a, int64_t row_stride, const BFloat16* panel, int64_t K, bool continues,
                        float* out, int64_t out_stride, Ahead ahead) {
    if constexpr (N % 2 == 0) {
      for (int n = 0; n < N; n += 2)
        two_by_two(a, row_stride, panel + n * 32, K, N * 64, continues, out + n * 16, out_stride);
    } else {
      product<N>(a, row_stride, panel, K, continues, out, out_stride, ahead);
      product<N>(a + kHeight * row_stride, row_stride, panel, K, continues, out + kHeight * out_stride, out_stride,
                 ahead);
    }
  }
  // Two tiles of rows by two of weights, of which each is loaded for both of the others: out [2*16, 2*16]. All have the
  // same height here, so that a tile of weights by its number (kWeights) may hold rows.
  static void two_by_two(const BFloat16* a, int64_t row_stride, const BFloat16* panel, int64_t K, int64_t pair_bytes,
                         bool continues, float* out, int64_t out_stride) {
    const int64_t sum_bytes = out_stride * 4;
    float* const below = out + kHeight * out_stride;
    if (continues) {
      load_tile<0>(out, sum_bytes);
      load_tile<1>(below, sum_bytes);
      load_tile<2>(out + 16, sum_bytes);
      load_tile<3>(below + 16, sum_bytes);
    } else {
      each<4>([]<int n>() { clear_tile<n>(); });
    }
    const char* weights = reinterpret_cast<const char*>(panel);
    if (K > 0) load_tile<6>(weights, pair_bytes);
    for (int64_t k = 0; k < K; k += 32) {
      load_tile<4>(a + k, row_stride * 2);
      load_tile<5>(a + kHeight * row_stride + k, row_stride * 2);
      load_tile<7>(weights + 64, pair_bytes);
      weights += 16 * pair_bytes;
      multiply_tiles<0, 4, 6>();
      multiply_tiles<1, 5, 6>();
      if (k + 32 < K) load_tile<6>(weights, pair_bytes);
      multiply_tiles<2, 4, 7>();
      multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(out, sum_bytes);
    store_tile<1>(below, sum_bytes);
    store_tile<2>(out + 16, sum_bytes);
    store_tile<3>(below + 16, sum_bytes);
  }

  template <int N, class F>
  static RNN_HD void each(F&& f) {
    [&]<size_t... n>(std::index_sequence<n...>) {
      (f.template operator()<int(n)>(), ...);
    }(std::make_index_sequence<N>());
  }
};

}  // namespace rnn::cpu::RNN_ISA
