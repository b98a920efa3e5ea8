// SELECT: the k best classes of a sample, by the teacher. Ties go to the lowest class; NaN comes before all.
#pragma once

#include "tile.h"

namespace KDK_NAMESPACE {
namespace {

// A class and its value in one integer: larger where the value is larger, then where the index is lower.
using Key = uint64_t;
using Ranking = std::vector<Key>;  // best first

inline Key key_of(float value, int64_t index) {
  value += 0.0f;  // -0 is 0
  uint32_t bits = float_bits(value);
  bits ^= (uint32_t{} - (bits >> 31)) | 0x80000000u;
  if (value != value) bits = ~uint32_t{};
  return static_cast<Key>(bits) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}
inline int64_t index_of(Key key) { return static_cast<uint32_t>(~static_cast<uint32_t>(key)); }
inline float value_of(Key key) {
  const auto bits = static_cast<uint32_t>(key >> 32);
  return bit_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Sorts a few distinct numbers, descending, by counting for each how many are larger: no branch to mispredict.
template <class N>
inline void sort_few(const N* from, int count, N* to) {
  for (int i = 0; i < count; ++i) {
    int larger = 0;
    for (int j = 0; j < count; ++j) larger += from[j] > from[i];
    to[larger] = from[i];
  }
}

// The k largest of distinct keys, descending.
inline void keep_best(Ranking& ranking, size_t k) {
  constexpr size_t kFew = 32;
  const size_t count = ranking.size();
  if (count <= kFew) {
    Key unsorted[kFew];
    std::copy(ranking.begin(), ranking.end(), unsorted);
    sort_few(unsorted, static_cast<int>(count), ranking.data());
  } else if (k <= kFew) {
    std::partial_sort(ranking.begin(), ranking.begin() + k, ranking.end(), std::greater<>());
  } else {
    const auto end = ranking.begin() + std::min(k, count);
    if (k < count) std::nth_element(ranking.begin(), end, ranking.end(), std::greater<>());
    std::sort(ranking.begin(), end, std::greater<>());
  }
  if (count > k) ranking.resize(k);
}

// The values a selection ranks: the k largest of them are wanted, or, as their opposites, the k smallest.
template <bool Largest>
struct Ranked {
  const float* values;

  float operator[](int i) const { return Largest ? values[i] : -values[i]; }
  Vec at(int i) const { return Largest ? load(values + i) : -load(values + i); }
};

// A number that at least k of the values reach, close to the k-th largest: the k-th largest among the maxima of some
// subsets, at least twice as many as k. -inf where that would not pay.
template <bool Largest>
float lower_bound_of_best(Ranked<Largest> ranked, int count, int k) {
  constexpr int W = kLanes, kSubsets = 64;
  if (k > kSubsets / 2 || count < kSubsets) return -INFINITY;
  Vec maxima[kSubsets / W];
  for (Vec& m : maxima) m = broadcast(-INFINITY);
  for (int i = 0; i + kSubsets <= count; i += kSubsets)
    for (int j = 0; j < kSubsets / W; ++j) {
      __builtin_prefetch(ranked.values + count + i + j * W);  // the next tile, or row
      maxima[j] = max(ranked.at(i + j * W), maxima[j]);
    }
  int vectors = kSubsets / W;
  for (; vectors > 1 && vectors / 2 * W >= 2 * k; vectors /= 2)
    for (int j = 0; j < vectors / 2; ++j) maxima[j] = max(maxima[j], maxima[j + vectors / 2]);
  float all[kSubsets];
  for (int j = 0; j < vectors; ++j) store(all + j * W, maxima[j]);
  Vec bound = broadcast(-INFINITY);
  for (int j = 0; j < vectors; ++j) {
    Ints larger{};
    for (int i = 0; i < vectors * W; ++i) larger -= broadcast(all[i]) > maxima[j];
    bound = max(larger >= k - 1 ? maxima[j] : bound, bound);
  }
  return horizontal_max(bound);
}

// Calls found(i) for the values that are not below a bound, in order. They are few: all comparisons go first, so that
// nothing has to be guessed at but which of their words hold one.
template <bool Largest, class Found>
inline void each_not_below(Ranked<Largest> ranked, int count, float bound, const Found& found) {
  constexpr int W = kLanes, kWord = 64;
  const Vec bounds = broadcast(bound);
  uint64_t hits[kTile / kWord];
  const int whole = count / kWord;
  for (int word = 0; word < whole; ++word) {
    uint64_t bits = 0;
    for (int j = 0; j < kWord; j += W)
      bits |= static_cast<uint64_t>(not_less(ranked.at(word * kWord + j), bounds)) << j;
    hits[word] = bits;
  }
  if (count % kWord) hits[whole] = 0;
  for (int i = whole * kWord; i < count; ++i) hits[whole] |= static_cast<uint64_t>(!(ranked[i] < bound)) << i % kWord;
  for (int word = 0; word < ceil_div(count, kWord); ++word)
    for (uint64_t bits = hits[word]; bits; bits &= bits - 1) found(word * kWord + __builtin_ctzll(bits));
}

// The best classes so far of one row, tile by tile.
class Selection {
 public:
  // `best` gets no more than k; it is sorted by finish().
  Selection(Ranking& best, int k, bool largest) : best_(best), k_(k), largest_(largest) { best_.clear(); }

  // Adds classes from `begin` on, at most a tile.
  void add(const float* teacher, int64_t begin, int count) {
    largest_ ? add_tile<true>(teacher, begin, count) : add_tile<false>(teacher, begin, count);
  }
  void finish() {
    if (!sorted_) keep_best(best_, k_);
  }

 private:
  template <bool Largest>
  void add_tile(const float* teacher, int64_t begin, int count) {
    const Ranked<Largest> ranked{teacher};
    const float bound = least_ > -INFINITY ? least_ : lower_bound_of_best(ranked, count, static_cast<int>(k_));
    each_not_below(ranked, count, bound, [&](int i) {
      best_.push_back(key_of(ranked[i], begin + i));
      sorted_ = false;
    });
    // Sorted after each tile, or, where that is dear, whenever as many have come again.
    if (best_.size() < (k_ <= kTile / 32 ? k_ : 2 * k_)) return;
    keep_best(best_, k_);
    sorted_ = true;
    least_ = value_of(best_.back());
  }

  Ranking& best_;
  const size_t k_;
  const bool largest_;
  float least_ = -INFINITY;
  bool sorted_ = false;
};

}  // namespace
}  // namespace KDK_NAMESPACE
