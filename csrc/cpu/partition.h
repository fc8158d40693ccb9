// How the threads of one call share its work.
#pragma once

#include <cstdint>

namespace rnn::cpu::RNN_ISA {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int kMaxThreads = 256;

// One thread's part of the loop. Threads of a group run the same rows and directions in step, each on its own units;
// groups never wait for each other.
struct Share {
  bool idle;
  int64_t first_direction, last_direction;
  int64_t first_row, last_row;
  int group, rank, size;  // size threads in the group
  int thread;

  // This thread's part of n things that the group shares.
  int64_t begin(int64_t n) const { return n * rank / size; }
  int64_t end(int64_t n) const { return n * (rank + 1) / size; }
};

// Splits D directions, then rows of the batch (no waiting at all), then units (one or two barriers per step).
struct Partition {
  int direction_parts;  // which divide D
  int row_parts;
  int unit_parts;

  // panel_bytes: weights of one direction; step_work: multiply-adds of one step of one direction.
  static Partition make(int threads, int64_t T, int64_t D, int64_t B, int64_t tiles, int64_t panel_bytes,
                        int64_t step_work) {
    constexpr int64_t kCacheBytes = 1280 << 10;   // of weights that stay in a core's L2 beside the rest
    constexpr int64_t kWorkPerThread = 64 << 10;  // less is done before a second thread has woken up
    constexpr int64_t kWorkPerBarrier = 16 << 10;
    constexpr int64_t kFewestRows = 4;  // fewer rows reread the weights too often
    constexpr int64_t kManyRows = 96;   // products of so many take several times as long as to read the weights from L3
    threads = int(least(threads, 1 + T * D * step_work / kWorkPerThread));
    Partition parts{1, 1, 1};
    for (int n = int(least(D, threads)); n > 1 && parts.direction_parts == 1; --n)
      if (D % n == 0) parts.direction_parts = n;
    const int64_t each = threads / parts.direction_parts;
    const int64_t useful_units = least(least(each, tiles), most(1, step_work / kWorkPerBarrier));
    const int64_t useful_rows = least(each, most(1, B / kFewestRows));
    // Shares of rows are even and wait for nobody; those of units are whole tiles, and wait at every step.
    const bool reads_all = panel_bytes <= kCacheBytes || B / useful_rows >= kManyRows;
    if (reads_all && useful_rows * 2 > each) {
      parts.row_parts = int(useful_rows);
      parts.unit_parts = int(least(useful_units, each / useful_rows));
    } else {
      parts.unit_parts = int(useful_units);
      parts.row_parts = int(least(most(1, B), each / useful_units));
    }
    return parts;
  }

  int used() const { return direction_parts * row_parts * unit_parts; }

  Share share(int thread, int64_t D, int64_t B) const {
    const int unit = thread % unit_parts;
    const int row = thread / unit_parts % row_parts;
    const int direction = thread / (unit_parts * row_parts);
    Share s{};
    s.idle = direction >= direction_parts;
    s.first_direction = D * direction / direction_parts;
    s.last_direction = D * (direction + 1) / direction_parts;
    s.first_row = B * row / row_parts;
    s.last_row = B * (row + 1) / row_parts;
    s.group = thread / unit_parts;
    s.rank = unit;
    s.size = unit_parts;
    s.thread = thread;
    return s;
  }
};

}  // namespace rnn::cpu::RNN_ISA
