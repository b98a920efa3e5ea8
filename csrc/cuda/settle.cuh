// Step 2 of a block's samples, one thread each: what the sweeps added up becomes losses and gradient coefficients.
#pragma once

#include "entries.cuh"
#include "samples.cuh"

namespace kdk::cuda {

// Statistics of all groups of a term, of one sample's piece: its sweep's and its entries'.
template <class X, Layout kLayout, Use kUse>
__device__ void piece_statistics(const Block<X, kLayout, kUse>& block, int of_sample, int t,
                                 GroupStats<double>* stats) {
  using T = Real<X>;
  const Call& call = block.call;
  const Term& term = call.objective.term[t];
  const Sample<T>& sample = block.samples[of_sample];
  const Entry<T>* entries = block.entries + (of_sample - block.own) * call.tiling.entries;
  const Sweep& sweep = call.sweep[call.sweep_of(t)];
  const T exponent = static_cast<T>(sweep.exponent);
  const int column = 1 + 4 * call.sweep_of(t);
  const int rest = term.groups() - 1;
  GroupStats<double> of_rest;
  of_rest.student_origin = sample.largest[kStudent] * exponent;
  of_rest.teacher_origin = sample.largest[kTeacher] * exponent;
  of_rest.student_sum = block.total(of_sample, column);
  of_rest.teacher_sum = block.total(of_sample, column + 1);
  if (sweep.forward) of_rest.teacher_gap = block.total(of_sample, column + 2);
  if (sweep.reverse) of_rest.student_gap = block.total(of_sample, column + 3);
  if (term.group_size(rest, call.classes) == 1)
    count_exactly(of_rest, sample.largest[kStudent], sample.largest[kTeacher], exponent);
  bool others = false;  // entries that are in the last group after all
  for (int e = 0; e < call.tiling.entries; ++e) others = others || (entries[e].counts && entries[e].group[t] == rest);
  if (others) merge(of_rest, entry_statistics(call, entries, t, rest, exponent), 1.0);
  stats[rest] = of_rest;
#pragma unroll 1
  for (int g = 0; g < rest; ++g) stats[g] = entry_statistics(call, entries, t, g, exponent);
}

// Adds an entry to the student's softmax, whose origins are logits.
template <class T>
__device__ void add_entry(SoftmaxStats<double>& softmax, const Entry<T>& entry) {
  const T origin = entry.raw;
  merge(softmax, SoftmaxStats<double>{origin, softmax_power(origin, start(origin))}, kLog2E);
}

// The student's softmax over a sample's piece, and its target's logit if that is in it.
template <class X, Layout kLayout, Use kUse>
__device__ SoftmaxStats<double> piece_softmax(const Block<X, kLayout, kUse>& block, int of_sample,
                                              double& target_logit) {
  using T = Real<X>;
  const Call& call = block.call;
  const Entry<T>* entries = block.entries + (of_sample - block.own) * call.tiling.entries;
  SoftmaxStats<double> softmax{block.samples[of_sample].largest[2], block.total(of_sample, 0)};
  for (int e = 0; e < call.tiling.entries; ++e) {
    if (entries[e].counts) add_entry(softmax, entries[e]);
  }
  target_logit = entries[0].counts ? entries[0].raw : 0;
  return softmax;
}

// What is known of a piece of a sample: in its block of the cluster or, of split samples, in global memory.
template <class X, Layout kLayout, Use kUse>
__device__ __forceinline__ const Exchange& piece_exchange(const Block<X, kLayout, kUse>& block, int of_sample,
                                                          int piece) {
  const Call& call = block.call;
  if (!block.split()) return *of_block(block.exchange + of_sample, piece);
  return call.exchange[block.samples[of_sample].number * call.tiling.pieces + piece];
}

// The statistics of a group of a row from those of its pieces: a lane each, all of which must call it and know it then.
template <class X, Layout kLayout, Use kUse>
__device__ GroupStats<double> merged_over_lanes(const Block<X, kLayout, kUse>& block, int t, int g) {
  const int pieces = block.call.tiling.pieces;
  GroupStats<double> own;
  if (block.thread < pieces) own = piece_exchange(block, 0, block.thread).group[t][g];
  for (int piece = block.thread + 32; block.split() && piece < pieces; piece += 32)
    merge(own, piece_exchange(block, 0, piece).group[t][g], 1.0);
  const auto sum = [](double a, double b) { return a + b; };
  rebase(own, block.over_lanes(own.student_origin, Larger{}), block.over_lanes(own.teacher_origin, Larger{}), 1.0);
  own.student_sum = block.over_lanes(own.student_sum, sum);
  own.teacher_sum = block.over_lanes(own.teacher_sum, sum);
  own.teacher_gap = block.over_lanes(own.teacher_gap, sum);
  own.student_gap = block.over_lanes(own.student_gap, sum);
  return own;
}

template <class X, Layout kLayout, Use kUse>
__device__ void settle(const Block<X, kLayout, kUse>& block) {
  using T = Real<X>;
  const Call& call = block.call;
  const Objective& objective = call.objective;
  const int own = block.thread, columns = objective.parts();
  const bool there = own < call.tiling.samples;
  Sample<T>& sample = block.samples[there ? own : 0];
  const bool valid = there && sample.valid;
  const bool first_piece = block.piece == 0, alone = block.pieces() == 1 && !block.split();
  const int64_t number = there ? sample.number : -1;
  const double weight = valid ? sample.weight : 0;
  const bool by_sample = block.standardization() == Standardize::by_sample;
  T* saved =
      number >= 0 && call.saved && first_piece ? static_cast<T*>(call.saved) + number * saved_size(objective) : nullptr;
  double loss = 0, entropy = 0;
  T softmax_origin = 0, softmax_inverse = 0;
  if (there && objective.has_ce()) {
    double target_logit = 0;
    SoftmaxStats<double> softmax;
    if (alone) {
      softmax = piece_softmax(block, own, target_logit);
    } else {
      for (int piece = 0; piece < call.tiling.pieces; ++piece) {
        const Exchange& other = piece_exchange(block, own, piece);
        merge(softmax, other.softmax, kLog2E);
        target_logit += other.target_logit;
      }
    }
    softmax_origin = static_cast<T>(start(softmax.origin));
    softmax_inverse = static_cast<T>(inverse(softmax.sum));
    // Of one class it is exactly 0.
    entropy =
        call.classes == 1 ? target_logit - target_logit : log(softmax.sum) + (start(softmax.origin) - target_logit);
    loss = objective.ce_weight * entropy;
  }
  if (there) {
    sample.softmax_origin = softmax_origin;
    sample.entropy_factor = static_cast<T>(objective.ce_slope(call.classes) * weight);
    sample.softmax_factor = valid ? sample.entropy_factor * softmax_inverse : T(0);
    if (by_sample) sample.factor = static_cast<T>(sample.student.factor * weight);
  }
  if (call.part_values && first_piece)
    write_result(block, number, call.part_values, columns, 0, valid ? entropy * weight : 0);
  if (saved) {
    saved[0] = static_cast<T>(weight);
    saved[1] = softmax_origin;
    saved[2] = softmax_inverse;
    saved += 3;
    if (by_sample) saved += 7;
  }
  int column = 1;
  // These are in shared memory: registers are too few.
  GroupStats<double>* stats = block.groups + (there ? own : 0) * kMaxGroups;
  auto& result = reinterpret_cast<TermResult<double>*>(shared_memory + call.regions.results)[there ? own : 0];
  static_assert(sizeof(TermResult<double>) == kResults * sizeof(double));
  for (int t = 0; t < objective.terms; ++t) {
    const Term& term = objective.term[t];
    const int groups = term.groups();
    if (block.kRows && !alone) {  // of one row
#pragma unroll 1
      for (int g = 0; g < groups; ++g) {
        const GroupStats<double> merged = merged_over_lanes(block, t, g);
        if (there) stats[g] = merged;
      }
    }
    if (there) {
      if (alone) {
        piece_statistics(block, own, t, stats);
      } else if (!block.kRows) {
#pragma unroll 1
        for (int g = 0; g < groups; ++g) {
          GroupStats<double> merged;
          for (int piece = 0; piece < call.tiling.pieces; ++piece)
            merge(merged, piece_exchange(block, own, piece).group[t][g], 1.0);
          stats[g] = merged;
        }
      }
      evaluate<block.kRanks ? kMaxGroups : 2>(term, stats, call.classes, 1.0, result);
      loss += result.loss;
      const double factor = by_sample ? 1 : weight;
#pragma unroll 1
      for (int g = 0; g < groups; ++g) {
        const GroupCoefficients<double>& by = result.group[g];
        GroupShare<T>& share = sample.share[t][g];
        share.student_origin = static_cast<T>(start(stats[g].student_origin));
        share.teacher_origin = static_cast<T>(start(stats[g].teacher_origin));
        const T student = static_cast<T>(by.student) * from_rounded<T>(stats[g].student_origin);
        share.student = valid ? student * static_cast<T>(factor) : T(0);
        share.tilt = valid ? static_cast<T>(by.tilt * factor) : T(0);
        share.teacher = valid ? static_cast<T>(-by.teacher * factor) : T(0);
        if (saved) {
          saved[0] = share.student_origin;
          saved[1] = share.teacher_origin;
          saved[2] = student;
          saved[3] = static_cast<T>(by.tilt);
          saved[4] = static_cast<T>(-by.teacher);
          saved += 5;
        }
      }
    }
    if (call.part_values && first_piece) {
#pragma unroll 1
      for (int i = 0; i <= groups; ++i) {
        write_result(block, number, call.part_values, columns, column++, valid ? result.parts[i] * weight : 0);
      }
    }
  }
  if (first_piece) write_result(block, number, call.losses, 1, 0, valid ? loss * weight : 0);
}

// The results of a block none of whose samples counts.
template <class X, Layout kLayout, Use kUse>
__device__ void settle_nothing(const Block<X, kLayout, kUse>& block) {
  const Call& call = block.call;
  if (block.piece != 0) return;
  const int64_t number = block.thread < call.tiling.samples ? block.samples[block.thread].number : -1;
  const int columns = call.objective.parts();
  write_result(block, number, call.losses, 1, 0, 0);
  for (int i = 0; call.part_values && i < columns; ++i) write_result(block, number, call.part_values, columns, i, 0);
  if (call.saved && number >= 0) static_cast<Real<X>*>(call.saved)[number * saved_size(call.objective)] = 0;
}

// Tells the others of the cluster what this piece adds up to; a cluster barrier must come after.
template <class X, Layout kLayout, Use kUse>
__device__ void tell_statistics(const Block<X, kLayout, kUse>& block) {
  const Call& call = block.call;
  if (block.thread >= call.tiling.samples) return;
  Exchange& exchange = block.exchange[block.thread];
  if (call.objective.has_ce()) exchange.softmax = piece_softmax(block, block.thread, exchange.target_logit);
  for (int t = 0; t < call.objective.terms; ++t) piece_statistics(block, block.thread, t, exchange.group[t]);
}

// Writes which classes lead. Of samples that do not count nobody will ask.
template <class X, Layout kLayout, Use kUse>
__device__ void write_members(const Block<X, kLayout, kUse>& block) {
  if (!block.call.members || !block.sample().valid) return;
  for (int e = block.member; e < block.call.tiling.entries; e += block.team)
    write_member(block.call, block.sample().number, e, block.entries[e]);
}

}  // namespace kdk::cuda
