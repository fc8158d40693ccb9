#include "cpu/digest_keys.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace rnn::cpu {
namespace {

DigestKeys draw() {
  constexpr size_t kMost = 256;  // that the system gives at once
  DigestKeys keys;
  for (uint32_t* words : {keys.a, keys.b}) {
    char* bytes = reinterpret_cast<char*>(words);
    for (size_t at = 0; at < kDigestPeriod; at += kMost) {
      if (getentropy(bytes + at, kMost) != 0)
        throw std::system_error(errno, std::generic_category(), "rnnkernels: random keys for kept weights");
    }
    std::replace(words, words + kDigestPeriod / 4, uint32_t(0), uint32_t(1));
  }
  return keys;
}

}  // namespace

const DigestKeys& digest_keys() {
  static const DigestKeys keys = draw();
  return keys;
}

}  // namespace rnn::cpu
