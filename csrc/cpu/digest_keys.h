// The random keys of digests. Compiled once, for all instruction sets.
#pragma once

#include <cstdint>

namespace rnn::cpu {

constexpr int64_t kDigestPeriod = 4096;  // bytes of memory after which keys are used again: they stay in L1 beside it

struct DigestKeys {
  alignas(64) uint32_t a[kDigestPeriod / 4], b[kDigestPeriod / 4];  // none of them 0
};

// Drawn at the first call; throws std::system_error where the system has no random numbers.
const DigestKeys& digest_keys();

}  // namespace rnn::cpu
