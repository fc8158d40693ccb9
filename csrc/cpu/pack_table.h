// Which packed weights are kept between calls, and how much memory they take: the bookkeeping alone, which knows no
// torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace rnn::cpu {

// Safe to use from any thread. Packs are never written to once they are here: who has found one may use it for as long
// as it likes, also when it has been dropped meanwhile. An Owner is a weak reference to the memory of a weight: where
// one of them has expired(), nobody asks for its packs again. They keep what a Key holds of that memory from being
// reused: an entry holds on to the address, if not to the memory.
template <class Key, class Hash, class Pack, class Owner>
class PackTable {
 public:
  using Owners = std::vector<Owner>;

  // How often weights have been written to, as far as it is counted; none where it is not.
  using Version = std::optional<uint64_t>;

  struct Found {
    std::shared_ptr<Pack> pack;  // null where the weights have been seen, and no more
    PackedType type;             // that these weights are packed in
    bool by_version;             // whether their version tells that they have not changed
    Version version;             // at which they held what is packed

    bool same_choice(const Found& other) const { return type == other.type && by_version == other.by_version; }
    bool trusted(const Version& now) const { return pack && by_version && now && now == version; }
  };
  // What was put under this key, if anything was.
  std::optional<Found> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(key);
    if (found == entries_.end()) return std::nullopt;
    found->second.used = ++clock_;
    return found->second.now;
  }

  // In place of what find() gave: packs of so many bytes, or null, which says that the weights have been seen. Where
  // another thread was faster, its own stay. What does not fit into the limit is not kept; what was used the longest
  // time ago makes room.
  void put(const Key& key, Owners owners, std::shared_ptr<Pack> pack, int64_t bytes, const std::optional<Found>& found,
           const Version& version = {}) {
    Entry entry{{}, bytes, std::move(owners), 0};
    if (found) entry.now = *found;
    entry.now.pack = std::move(pack);
    entry.now.version = version;
    const std::lock_guard lock(mutex_);
    bury();
    if (const auto now = entries_.find(key); now != entries_.end()) {
      const Found& theirs = now->second.now;
      if (!found || theirs.pack != found->pack || !theirs.same_choice(*found)) return;
      erase(now);
    }
    if (bytes > limit_) entry.forget();
    shrink(limit_ - entry.bytes);
    entry.used = ++clock_;
    bytes_ += entry.bytes;
    entries_.emplace(key, std::move(entry));
  }

  // The packs that find() gave were seen to be what the weights hold, at a version that was asked for before that.
  // Where something was chosen meanwhile, they are compared once more.
  void confirm(const Key& key, const Found& found, const Version& version) {
    const std::lock_guard lock(mutex_);
    const auto now = entries_.find(key);
    if (now == entries_.end()) return;
    Found& theirs = now->second.now;
    if (theirs.pack == found.pack && theirs.version == found.version) theirs.version = version;
  }

  // From now on the packed weights of each entry whose key is among(key) are of this type, and trusted by version or
  // not, as long as the weights live; but first of all they are compared. Returns how many entries there are.
  template <class Among>
  int64_t choose(const Among& among, PackedType type, bool by_version) {
    const std::lock_guard lock(mutex_);
    int64_t count = 0;
    each_of(among, [&](Entry& entry) {
      ++count;
      entry.now.by_version = by_version;
      entry.now.version = {};
      if (entry.now.type == type) return;
      bytes_ -= entry.bytes;
      entry.forget();
      entry.now.type = type;
    });
    return count;
  }

  struct Kept {
    int64_t bytes;  // 0 where there are none now
    PackedType type;
    bool by_version;
  };
  template <class Among>
  std::vector<Kept> kept_of(const Among& among) {
    const std::lock_guard lock(mutex_);
    std::vector<Kept> kept;
    each_of(among, [&](const Entry& entry) { kept.push_back({entry.bytes, entry.now.type, entry.now.by_version}); });
    return kept;
  }

  int64_t bytes() {
    const std::lock_guard lock(mutex_);
    bury();
    return bytes_;
  }

  int64_t limit() {
    const std::lock_guard lock(mutex_);
    return limit_;
  }
  void set_limit(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
    shrink(bytes);
  }

  void drop() {
    const std::lock_guard lock(mutex_);
    entries_.clear();
    bytes_ = 0;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Entry {
    Found now{nullptr, PackedType::kOwn, false, {}};
    int64_t bytes;
    Owners owners;
    uint64_t used;
    // That the weights were seen, and what was chosen for them, stays known: results may depend on the type.
    void forget() { now.pack.reset(), bytes = 0; }
  };
  using Entries = std::unordered_map<Key, Entry, Hash>;

  template <class Among, class F>
  void each_of(const Among& among, const F& f) {
    bury();
    for (auto& [key, entry] : entries_)
      if (among(key)) f(entry);
  }

  void shrink(int64_t most) {
    while (bytes_ > most) {
      Entry* oldest = nullptr;
      for (auto& [key, entry] : entries_)
        if (entry.bytes && (!oldest || entry.used < oldest->used)) oldest = &entry;
      bytes_ -= oldest->bytes;
      oldest->forget();
    }
  }

  typename Entries::iterator erase(typename Entries::iterator entry) {
    bytes_ -= entry->second.bytes;
    return entries_.erase(entry);
  }

  void bury() {  // the packs of weights that are gone
    for (auto entry = entries_.begin(); entry != entries_.end();) {
      const Owners& owners = entry->second.owners;
      const bool gone = std::any_of(owners.begin(), owners.end(), [](const Owner& each) { return each.expired(); });
      entry = gone ? erase(entry) : std::next(entry);
    }
  }

  std::mutex mutex_;
  Entries entries_;
  int64_t bytes_ = 0, limit_ = int64_t(256) << 20;
  uint64_t clock_ = 0;
};

}  // namespace rnn::cpu
