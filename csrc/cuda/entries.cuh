// Classes that are worked on one by one: the target and the teacher's leading classes. They are masked in shared
// memory, so that the sweeps see a term's last group alone, and come back in as entries: a few numbers each.
#pragma once

#include "sweeps.cuh"

namespace kdk::cuda {

constexpr int kNoClass = 0x7fffffff;

template <class T>
__device__ __forceinline__ bool better(const Candidate<T>& a, const Candidate<T>& b) {
  return a.of_class != kNoClass &&
         (b.of_class == kNoClass || a.value > b.value || (a.value == b.value && a.of_class < b.of_class));
}

template <class T>
__device__ __forceinline__ Candidate<T> best_of(const Candidate<T>& a, const Candidate<T>& b) {
  return better(a, b) ? a : b;
}

// The best class of the thread's own that is not as good as `last`.
template <class X, Layout kLayout, Use kUse>
__device__ Candidate<Real<X>> best_after(const Block<X, kLayout, kUse>& block, Real<X> sign,
                                         const Candidate<Real<X>>& last) {
  using T = Real<X>;
  Candidate<T> best{minus_infinity<T>(), kNoClass};
  for (int v = block.member; v < block.vectors; v += block.team) {
    T t[block.kWidth];
    block.load(kTeacher, v, t);
    standardize(block, kTeacher, v, t);
    const int c = block.class_of(v);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) {
      const T value = static_cast<unsigned>(c + w) < static_cast<unsigned>(block.count) ? sign * t[w] : T(NAN);
      const int of_class = block.begin + c + w;
      const bool left = value < last.value || (value == last.value && of_class > last.of_class);
      if (left && (value > best.value || best.of_class == kNoClass)) best = {value, of_class};
    }
  }
  return best;
}

// The best candidate of the team, known to all of it. All threads of the block must call it. `round` alternates the
// place of partial results, so that one barrier a round is enough.
template <class X, Layout kLayout, Use kUse>
__device__ Candidate<Real<X>> best_of_team(const Block<X, kLayout, kUse>& block, Candidate<Real<X>> own, int round) {
  using T = Real<X>;
  if constexpr (block.kRows) {
    for (int distance = min(block.team, 32) / 2; distance > 0; distance /= 2) {
      const Candidate<T> other{__shfl_xor_sync(kAllLanes, own.value, distance),
                               __shfl_xor_sync(kAllLanes, own.of_class, distance)};
      own = best_of(own, other);
    }
  }
  if (block.partial_results() == 1) return own;
  const auto place = [&](int result) {
    return reinterpret_cast<Candidate<T>*>(block.partial(block.own, result)) + round % 2;
  };
  if (block.writes_result()) *place(block.own_result()) = own;
  __syncthreads();
  for (int result = 0; result < block.partial_results(); ++result) own = best_of(own, *place(result));
  return own;
}

// Visits the entries of all of the block's samples, of whatever team the threads are: few take few warps.
// visit(the block as the sample's team sees it, which entry)
template <class X, Layout kLayout, Use kUse, class Visit>
__device__ __forceinline__ void over_entries(const Block<X, kLayout, kUse>& block, Visit visit) {
  const Tiling& tiling = block.call.tiling;
  for (int i = block.thread; i < tiling.samples * tiling.entries; i += tiling.threads())
    visit(block.of_sample(i % tiling.samples), i / tiling.samples);
}

// The term by rank that an entry is a candidate of; -1 for the target.
__device__ __forceinline__ int term_of_entry(const Call& call, int e) {
  if (e < call.first_entry(0)) return -1;
  const bool in_second = call.objective.terms > 1 && call.objective.term[1].by_rank() && e >= call.first_entry(1);
  return in_second ? 1 : 0;
}

// What at least `k` of the sample's classes reach, if that many are seen: the lowest of the k best of groups of
// classes. All threads of the block must call it.
template <bool kLargest, class X, Layout kLayout, Use kUse>
__device__ Real<X> bound_of_best(const Block<X, kLayout, kUse>& block, int k) {
  using T = Real<X>;
  constexpr int kGroups = block.kRows ? 8 : 16, kVectors = kGroups / block.kWidth;
  T best[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) best[g] = minus_infinity<T>();
#pragma unroll 1
  for (int v = block.member; v < block.vectors;) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i > 0 && v >= block.vectors) break;
      T t[block.kWidth];
      block.load(kTeacher, v, t);
      standardize(block, kTeacher, v, t);
      const int c = block.class_of(v);
      if (c >= 0 && c + block.kWidth <= block.count) {
#pragma unroll
        for (int w = 0; w < block.kWidth; ++w)
          best[i * block.kWidth + w] = larger(best[i * block.kWidth + w], kLargest ? t[w] : -t[w]);
      }
      v += block.team;
    }
  }
  T bound = 0;
#pragma unroll 1
  for (int i = 0; i < k; ++i) {
    bound = best[0];
#pragma unroll
    for (int g = 1; g < kGroups; ++g) bound = larger(bound, best[g]);
    bound = block.over_lanes(bound, Larger{});
#pragma unroll
    for (int g = 0; g < kGroups; ++g) best[g] = best[g] == bound ? minus_infinity<T>() : best[g];
  }
  block.template maximum<1>(&bound);  // what a warp's classes reach is as good as what another's do
  return bound;
}

// Collects the sample's classes that reach a bound. False, for the whole block, if they are more than there is room
// for.
template <bool kLargest, class X, Layout kLayout, Use kUse>
__device__ bool collect(const Block<X, kLayout, kUse>& block, Real<X> bound) {
  using T = Real<X>;
  Sample<T>& sample = block.sample();
  const int room = block.call.tiling.candidates;
  if (block.member == 0) sample.candidates = 0;
  __syncthreads();
  const int vectors = sample.valid ? block.vectors : 0;
  for (int v = block.member; v < vectors; v += block.team) {
    T t[block.kWidth], best = minus_infinity<T>();
    block.load(kTeacher, v, t);
    standardize(block, kTeacher, v, t);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) best = larger(best, kLargest ? t[w] : -t[w]);
    if (best < bound) continue;
    const int c = block.class_of(v);
#pragma unroll
    for (int w = 0; w < block.kWidth; ++w) {
      const T value = kLargest ? t[w] : -t[w];
      const bool inside = static_cast<unsigned>(c + w) < static_cast<unsigned>(block.count);
      if (!inside || !(value >= bound)) continue;
      const int at = atomicAdd(&sample.candidates, 1);
      if (at < room) block.candidates[at] = {value, block.begin + c + w};
    }
  }
  __syncthreads();
  return !__syncthreads_or(sample.valid && sample.candidates > room);
}

// Collects the classes that may be among the k best, and knows whether there was room for them.
template <class X, Layout kLayout, Use kUse>
__device__ bool collect_best(const Block<X, kLayout, kUse>& block, const Term& term) {
  return term.largest ? collect<true>(block, bound_of_best<true>(block, term.k))
                      : collect<false>(block, bound_of_best<false>(block, term.k));
}

// Names the k best classes, one after the other, whatever they are: each one is looked for among all that follow.
template <class X, Layout kLayout, Use kUse>
__device__ void rank_one_by_one(const Block<X, kLayout, kUse>& block, Real<X> sign, int k, Entry<Real<X>>* entries) {
  using T = Real<X>;
  Candidate<T> own = best_after(block, sign, Candidate<T>{static_cast<T>(INFINITY), -1});
  for (int rank = 0; rank < k; ++rank) {
    const Candidate<T> best = best_of_team(block, own, rank);
    if (block.member == 0 && block.sample().valid && best.of_class != kNoClass) entries[rank].of_class = best.of_class;
    if (best.of_class == own.of_class && best.of_class != kNoClass && rank + 1 < k) own = best_after(block, sign, best);
  }
}

// Names the entries of the piece: the target, and for each term by rank the piece's k best classes. Ends with a
// barrier.
template <class X, Layout kLayout, Use kUse>
__device__ void find_entries(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const Call& call = block.call;
  const Sample<T>& sample = block.sample();
  over_entries(block, [&](const Block<X, kLayout, kUse>& of, int e) {
    const int target = of.sample().target, t = term_of_entry(call, e);
    const bool inside = of.sample().valid && target >= block.begin && target < block.begin + block.count;
    of.entries[e].of_class = t < 0 && inside ? target : -1;
    of.entries[e].rank = t < 0 ? 0 : e - call.first_entry(t);
  });
  for (int t = 0; block.kRanks && t < call.objective.terms; ++t) {
    const Term& term = call.objective.term[t];
    if (!term.by_rank()) continue;
    const T sign = term.largest ? T(1) : T(-1);
    Entry<T>* entries = block.entries + call.first_entry(t);
    if (collect_best(block, term)) {
      const int count = sample.valid ? sample.candidates : 0;
      for (int i = block.member; i < count; i += block.team) {
        const Candidate<T> own = block.candidates[i];
        int rank = 0;
        for (int other = 0; other < count; ++other) rank += better(block.candidates[other], own);
        if (rank < term.k) entries[rank].of_class = own.of_class;
      }
    } else {
      rank_one_by_one(block, sign, term.k, entries);
    }
    __syncthreads();
  }
  __syncthreads();
}

// Takes the entries that forward found from `members`.
template <class X, Layout kLayout, Use kUse>
__device__ void read_entries(const Block<X, kLayout, kUse>& block) {
  const Call& call = block.call;
  const int first = call.first_entry(0), columns = call.tiling.entries - first;
  over_entries(block, [&](const Block<X, kLayout, kUse>& of, int e) {
    const Sample<Real<X>>& sample = of.sample();
    const int64_t of_class = !sample.valid ? -1
                             : e < first   ? sample.target
                                           : call.members[sample.number * columns + e - first];
    const bool inside = of_class >= block.begin && of_class < block.begin + block.count;
    of.entries[e].of_class = inside ? static_cast<int>(of_class) : -1;
    int rank = e;
    for (int t = 0; t < call.objective.terms; ++t)
      if (e >= call.first_entry(t)) rank = e - call.first_entry(t);
    of.entries[e].rank = rank;
  });
}

// Reads the entries' logits; a barrier must come before and after.
template <class X, Layout kLayout, Use kUse>
__device__ void read_logits(const Block<X, kLayout, kUse>& block) {
  over_entries(block, [](const Block<X, kLayout, kUse>& of, int e) {
    Entry<Real<X>>& entry = of.entries[e];
    entry.raw = entry.student = entry.teacher = 0;
    if (entry.of_class < 0) return;
    const int slot = of.slot_of(entry.of_class - of.begin);
    entry.raw = widen(of.slot(kStudent, slot));
    entry.student = standardized(of, kStudent, entry.of_class, entry.raw);
    entry.teacher = standardized(of, kTeacher, entry.of_class, widen(of.slot(kTeacher, slot)));
  });
}

// The rank of an entry among the candidates of all pieces: how many are better. `others(piece)` are a piece's entries.
template <class T, class Others>
__device__ int rank_of(const Call& call, const Term& term, int first, int e, int piece, const Entry<T>& entry,
                       Others others) {
  const T sign = term.largest ? T(1) : T(-1);
  const Candidate<T> own{sign * entry.teacher, entry.of_class};
  int rank = e - first;
  for (int i = 0; i < call.tiling.pieces; ++i) {
    if (i == piece) continue;
    const Entry<T>* of_piece = others(i);
    for (int j = first; j < first + term.k; ++j) {  // best first
      const Candidate<T> other{sign * of_piece[j].teacher, of_piece[j].of_class};
      if (other.of_class < 0 || !better(other, own)) break;
      ++rank;
    }
  }
  return rank;
}

// Settles the ranks among all pieces of the cluster's samples.
template <class X, Layout kLayout, Use kUse>
__device__ void rank_in_cluster(const Block<X, kLayout, kUse>& block) {
  const Call& call = block.call;
  for (int e = block.member; e < call.tiling.entries; e += block.team) {
    Entry<Real<X>>& entry = block.entries[e];
    const int t = term_of_entry(call, e);
    if (t < 0 || entry.of_class < 0) continue;
    entry.rank = rank_of(call, call.objective.term[t], call.first_entry(t), e, block.piece, entry,
                         [&](int piece) { return of_block(block.entries, piece); });
  }
}

// Tells which group of each term an entry is in, and whether it is the first one of its class among the piece's.
template <class T>
__device__ void resolve(const Call& call, const Entry<T>* entries, int e, int target, Entry<T>& entry) {
  bool counts = entry.of_class >= 0;
  if (counts && call.first_entry(0) == 1 && e > 0) counts = entries[0].of_class != entry.of_class;
#pragma unroll
  for (int t = 0; t < kMaxTerms; ++t) {
    entry.group[t] = 0;
    if (t >= call.objective.terms) continue;
    const Term& term = call.objective.term[t];
    int group = term.groups() - 1;
    if (term.kind == PartitionKind::target && entry.of_class == target) group = 0;
    if (term.by_rank()) {
      const int first = call.first_entry(t), end = first + term.k;
      int same = e;
      if (e < first || e >= end)
        for (same = first; same < end && entries[same].of_class != entry.of_class;) ++same;
      if (same < end) {
        if (same < e) counts = false;
        const int rank = entries[same].rank;
        if (rank < term.k) group = term.lead_group(rank);
      }
    }
    entry.group[t] = static_cast<int16_t>(group);
  }
  entry.counts = counts;
}

// Resolves the entries and masks their logits; barriers must come before and after.
template <class X, Layout kLayout, Use kUse>
__device__ void mask_entries(const Block<X, kLayout, kUse>& block) {
  over_entries(block, [](const Block<X, kLayout, kUse>& of, int e) {
    Entry<Real<X>>& entry = of.entries[e];
    resolve(of.call, of.entries, e, of.sample().target, entry);
    if (!entry.counts) return;
    const int slot = of.slot_of(entry.of_class - of.begin);
    of.slot(kStudent, slot) = of.slot(kTeacher, slot) = narrow<X>(minus_infinity<Real<X>>());
  });
}

// Writes that an entry's class leads, where it does.
template <class T>
__device__ void write_member(const Call& call, int64_t number, int e, const Entry<T>& entry) {
  const int first = call.first_entry(0), t = term_of_entry(call, e);
  if (t < 0 || entry.of_class < 0 || entry.rank >= call.objective.term[t].k) return;
  call.members[number * (call.tiling.entries - first) + call.first_entry(t) - first + entry.rank] = entry.of_class;
}

// Statistics of the entries of one group of a term, by one thread.
template <class T>
__device__ GroupStats<double> entry_statistics(const Call& call, const Entry<T>* entries, int t, int group,
                                               T exponent) {
  const int count = call.tiling.entries;
  T student = minus_infinity<T>(), teacher = minus_infinity<T>();
  for (int e = 0; e < count; ++e) {
    if (!entries[e].counts || entries[e].group[t] != group) continue;
    student = larger(student, entries[e].student);
    teacher = larger(teacher, entries[e].teacher);
  }
  const T student_origin = student * exponent, teacher_origin = teacher * exponent;
  GroupStats<double> stats;
  stats.student_origin = student_origin;
  stats.teacher_origin = teacher_origin;
  for (int e = 0; e < count; ++e) {
    if (!entries[e].counts || entries[e].group[t] != group) continue;
    const T a = fma(entries[e].student, exponent, -start(student_origin)),
            b = fma(entries[e].teacher, exponent, -start(teacher_origin));
    const T es = power(a), et = power(b), gap = b - a;
    stats.student_sum += es;
    stats.teacher_sum += et;
    if (et > 0) stats.teacher_gap += et * gap;
    if (es > 0) stats.student_gap += es * gap;
  }
  if (call.objective.term[t].group_size(group, call.classes) == 1) count_exactly(stats, student, teacher, exponent);
  return stats;
}

// The gradient of an entry in the logit that the terms see.
template <class T>
__device__ T entry_gradient(const Call& call, const Sample<T>& sample, const Entry<T>& entry) {
  T sum = 0;
#pragma unroll
  for (int t = 0; t < kMaxTerms; ++t) {
    if (t >= call.objective.terms) break;
    const Sweep& sweep = call.sweep[call.sweep_of(t)];
    const GroupShare<T>& share = sample.share[t][entry.group[t]];
    sum += slope_at(share, static_cast<T>(sweep.exponent), is_tilted(sweep, share), entry.student, entry.teacher);
  }
  return sum;
}

// The entries' share of product_sum().
template <class X, Layout kLayout, Use kUse>
__device__ double entry_products(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  double total = 0;
  for (int e = block.member; e < block.call.tiling.entries; e += block.team) {
    const Entry<T>& entry = block.entries[e];
    if (entry.counts && entry.student != minus_infinity<T>())
      total += entry_gradient(block.call, block.sample(), entry) * entry.student;
  }
  return total;
}

// Puts the entries' gradient in the student's place; a barrier must come before and after.
template <class X, Layout kLayout, Use kUse>
__device__ void entry_gradients(const Block<X, kLayout, kUse>& block) {
  over_entries(block, [](const Block<X, kLayout, kUse>& of, int e) {
    const Call& call = of.call;
    const Sample<Real<X>>& sample = of.sample();
    const Entry<Real<X>>& entry = of.entries[e];
    if (!entry.counts) return;
    Real<X> slope = chained(of, entry.student, entry_gradient(call, sample, entry));
    if (call.objective.has_ce()) {
      slope += softmax_gradient(sample, entry.raw);
      if (entry.of_class == sample.target) slope -= sample.entropy_factor;
    }
    of.slot(kStudent, of.slot_of(entry.of_class - of.begin)) = narrow<X>(slope);
  });
}

}  // namespace kdk::cuda
