// The row kernels, built once per instruction set (see simd.h): tiles of a row are loaded, widened, standardised and
// summed or differentiated; rows, and chunks of long rows, are spread over threads.
//
// A chunk has a fixed number of classes and partial statistics merge in the order of the classes, so that results
// depend neither on the number of threads nor on who computed what.

constexpr int64_t kChunk = 8 * kTile;     // classes of a chunk, the unit of work where a row is split over threads
constexpr int64_t kKeptClasses = 65536;   // exponentials of rows up to here are kept for the gradient (they fit in L2)
constexpr int64_t kSplitSamples = 16;     // fewer samples than this may be split over threads
constexpr int kBatch = kLanes<double>;    // rows that take step 2 together, at most
constexpr int kBatchClasses = 4 * kTile;  // their classes, at most
constexpr int64_t kGrainClasses = 16384;  // least work that is worth a thread
constexpr int64_t kFewClasses = 64;       // whose loss takes double precision: the roundings of few do not average out
constexpr int64_t kStripBytes = 1 << 20;  // of a strip's logits and gradients, so that they stay in L2
constexpr int64_t kLeastStrip = 512;      // classes; with fewer, rows would be read in too small pieces

// Rows ---------------------------------------------------------------------------------------------------------------

// Partial statistics of the rest groups over some classes of a row.
struct PartialStats {
  GroupStats<double> rest[kMaxTerms];
  SoftmaxStats<double> ce;
};

// Statistics of several rows, a row a lane: step 2 is the same for all.
struct BatchStats {
  GroupStats<Doubles> group[kMaxTerms][kMaxGroups];
  SoftmaxStats<Doubles> ce;
};

// Of sums that are numbers, gaps are none where one is infinite, as only one side masks its class, and the other's
// exponential underflowed.
inline void settle_masked_classes(GroupStats<Doubles>& stats) {
  const Doubles sums = stats.student_sum + stats.teacher_sum, infinite = sums == sums ? Doubles{} + INFINITY : sums;
  stats.teacher_gap = stats.teacher_gap == stats.teacher_gap ? stats.teacher_gap : infinite;
  stats.student_gap = stats.student_gap == stats.student_gap ? stats.student_gap : -infinite;
}

// Where only one side masks a whole group the masses' divergence is infinite, however little mass the other side has.
inline void settle_masked_groups(const Term& term, CentredTermResult<Doubles>& result) {
  const Doubles infinite = Doubles{} + INFINITY;
  Doubles forward{}, reverse{};
  for (int g = 0; g < term.groups(); ++g) {
    const auto student = result.student_lse[g] == -infinite, teacher = result.teacher_lse[g] == -infinite;
    forward = student & ~teacher ? infinite : forward;
    reverse = teacher & ~student ? infinite : reverse;
  }
  result.loss += weighed(term.mass, forward, reverse);
  result.parts[0] += weighed(term.mass_part, forward, reverse);
}

// The result of a term from some samples' statistics, with `unit` as that of their origins. Masses depend on
// differences of origins only: taken first, they are exact however large the logits are.
inline CentredTermResult<Doubles> evaluated(const Term& term, const GroupStats<Doubles>* stats, int64_t classes,
                                            double unit) {
  GroupStats<Doubles> relative[kMaxGroups];
  const int groups = term.groups();
  const auto set_origins = [&](Doubles GroupStats<Doubles>::* origin) {
    Doubles top = stats[0].*origin;
    for (int g = 1; g < groups; ++g) top = stats[g].*origin > top ? stats[g].*origin : top;
    top = top - top == 0 ? top : Doubles{};
    for (int g = 0; g < groups; ++g) relative[g].*origin = stats[g].*origin - top;
  };
  std::copy_n(stats, groups, relative);
  for (int g = 0; g < groups; ++g) settle_masked_classes(relative[g]);
  set_origins(&GroupStats<Doubles>::student_origin);
  set_origins(&GroupStats<Doubles>::teacher_origin);
  CentredTermResult<Doubles> result;
  evaluate(term, relative, classes, unit, result);
  settle_masked_groups(term, result);
  return result;
}

inline void set_lane(GroupStats<Doubles>& batch, int lane, const GroupStats<double>& stats) {
  batch.student_origin[lane] = stats.student_origin;
  batch.teacher_origin[lane] = stats.teacher_origin;
  batch.student_sum[lane] = stats.student_sum;
  batch.teacher_sum[lane] = stats.teacher_sum;
  batch.teacher_gap[lane] = stats.teacher_gap;
  batch.student_gap[lane] = stats.student_gap;
}

// Memory that a thread keeps from call to call.
template <class T>
struct Scratch {
  alignas(64) T student[kTile];
  alignas(64) T teacher[kTile];
  alignas(64) T gradient[kTile];
  alignas(64) T raw[kTile];
  alignas(64) double few[2][kFewClasses];
  Buffer<T> kept;
  Buffer<double> leads, kept_leads;
  std::vector<int64_t> members;
  Ranking<T> found, merged;
  std::vector<std::pair<T, int64_t>> lead_gradients;
  std::vector<int> unsorted, hidden;
  BatchStats stats, stats_of_few;  // lanes without a row hold whatever was there

  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// Which terms compute exponentials. Of two with the same groups, at temperatures that are equal or one twice the other,
// the hotter one leads: its exponentials, or their squares, are also those of the other, which follows. The cross
// entropy takes the first term's if they are a power of its own.
struct Sweeps {
  const Objective& o;
  int follower = -1;  // if any
  Also also = Also::nothing;
  int squarings = 0;  // for the softmax

  Sweeps(const Objective& objective, int64_t classes) : o(objective) {
    if (o.terms > 1 && o.same_groups()) {
      const double ratio = o.term[0].temperature / o.term[1].temperature;
      if (ratio == 1 || ratio == 2) follower = 1;
      if (ratio == 0.5) follower = 0;
      if (ratio == 2 || ratio == 0.5) also = Also::squares;
    }
    const double temperature = o.term[0].temperature;
    const bool power = temperature == 1 || temperature == 2 || temperature == 4;
    const bool raw = o.standardize == Standardize::none;
    if (!o.has_ce() || !raw || !power || also != Also::nothing || classes == 1) return;  // one class is exactly sure
    also = Also::softmax;
    squarings = temperature == 4 ? 2 : temperature == 2 ? 1 : 0;
  }

  // Whether a term's classes are swept for its exponentials, and those of any other that follows it.
  bool has(int t) const { return t != follower; }
  // The term whose exponentials a term takes.
  int leader(int t) const { return has(t) ? t : 1 - t; }
  bool squares() const { return also == Also::squares; }
  bool softmax() const { return also == Also::softmax; }

  // What is wanted of the sweep of a term.
  Also served(int t) const { return softmax() && t > 0 ? Also::nothing : also; }
  bool reverse(int t) const { return any(t, &Term::wants_reverse); }
  // Whether the rest's gradient depends on each class's own gap. Else a gap is not looked at: it may be infinite.
  bool tilted(int t) const { return any(t, &Term::tilted_rest); }

 private:
  bool any(int t, bool (Term::*wants)() const) const {
    return (o.term[t].*wants)() || (follower >= 0 && (o.term[follower].*wants)());
  }
};

// One row on its way through the three steps.
template <class T>
struct Row {
  int64_t sample;
  int lane;  // its place in the batch
  const void* student;
  const void* teacher;
  void* gradient;
  int64_t* members[kMaxTerms];  // classes that lead, by rank
  T weight, ce_origin, ce_inverse;
  GroupGradient<T> group[kMaxTerms][kMaxGroups];
  // Where samples are standardised: how, student and teacher, and the slope of the chain rule for a sum of 1.
  Affine<T> affine[2];
  T unit_slope;
};

// Classes of a row from `begin` on, as the kernels take them.
template <class T>
struct Tile {
  int64_t begin;
  int count;
  Source<T> student;
  Source<T> teacher;
};

template <class T>
class Worker {
  using AddSumsOfTerm = std::array<std::array<AddSums<T>, 2>, 2>;  // by whether careful, whether to keep
  template <class R>
  struct GradientOfTerm {
    GradientOfExps<R> exps;
    GradientOfLogits<R> logits;
  };

 public:
  Worker(const Problem& problem, const ClassStandardization<T>& classes)
      : p_(problem),
        o_(problem.objective),
        sweeps_(problem.objective, problem.classes),
        by_class_(classes),
        scratch_(Scratch<T>::of_this_thread()) {
    for (int t = 0; t < o_.terms; ++t) {
      exponent_[t] = static_cast<T>(o_.term[t].exponent());
      const Term& term = o_.term[t];
      for (const bool keep : {false, true}) {
        add_few_[t][keep] = choose_add_sums<double, false>({term.wants_reverse(), Also::nothing}, keep, true);
        const WantedSums rest{sweeps_.reverse(t), sweeps_.served(t)};
        for (const bool careful : {false, true})
          add_rest_[t][careful][keep] = problem.moments ? choose_add_sums<T, true>(rest, keep, careful)
                                                        : choose_add_sums<T, false>(rest, keep, careful);
      }
      const WantedGradient rest{t > 0 && sweeps_.has(0), sweeps_.tilted(t), sweeps_.served(t)};
      rest_gradient_[t] = {choose_gradient_of_exps<T>(rest), problem.moments
                                                                 ? choose_gradient_of_logits<T, true>(rest)
                                                                 : choose_gradient_of_logits<T, false>(rest)};
      if (term.groups() > 1) kept_leads_size_ = std::max(kept_leads_size_, padded<double>(term.leads()));
    }
    for (const bool tilt : {false, true}) {
      const WantedGradient leads{false, tilt, Also::nothing};
      lead_gradient_[tilt] = {choose_gradient_of_exps<double>(leads), choose_gradient_of_logits<double, false>(leads)};
    }
    if (keeps(problem)) {
      const int64_t size = padded<T>(p_.classes);
      kept_row_ = size * kept_arrays(o_);
      T* next = scratch_.kept.data(kept_row_ * batch());
      for (int t = 0; t < o_.terms; ++t) {
        if (!sweeps_.has(t)) continue;
        kept_[t] = {next, next + size, nullptr};
        next += 2 * size;
        if (!sweeps_.reverse(t)) continue;
        kept_[t].gap = next;
        next += size;
      }
    }
  }

  // Whether exponentials are kept: they must fit in cache, and rows that may be split over threads never keep them,
  // so that the arithmetic is a matter of the shape alone.
  static bool keeps(const Problem& p) {
    if ((!p.gradient.data && !p.sums_out) || !p.values || may_split(p)) return false;
    return sums_in_forward(p) || (!p.moments && p.classes * kept_arrays(p.objective) <= 2 * kKeptClasses);
  }

  // Whether the gradient can wait, in the standardised logits, where it will be: nothing is rounded twice or converted.
  static bool in_place(const Problem& p) {
    const auto direct = [](const Matrix& m) { return m.class_stride == 1 && is_arithmetic<T>(m.dtype); };
    return p.gradient.data && direct(p.gradient) && direct(p.student);
  }

  // Whether forward can add up the sums over samples on its way: the rows are short enough.
  static bool sums_in_forward(const Problem& p) { return p.sums_out && p.classes <= kTile; }

  // Whether rows are few and long enough to be split over threads, if those are more. A standardised sample is not: its
  // own moments would have to be settled between the threads first.
  static bool may_split(const Problem& p) {
    return p.samples < kSplitSamples && p.classes > kChunk && p.objective.standardize == Standardize::none;
  }

  int64_t chunks() const { return std::max<int64_t>(ceil_div(p_.classes, kChunk), 1); }

  // Starts a row in place: a copy of what was just written in parts would have to wait for all stores before it, the
  // last row's gradient among them.
  void begin_row(Row<T>& row, int64_t sample, int lane) const {
    row.sample = sample;
    row.lane = lane;
    row.student = element(p_, p_.student, sample);
    row.teacher = element(p_, p_.teacher, sample);
    row.gradient = p_.gradient.data ? element(p_, p_.gradient, sample) : nullptr;
    row.ce_origin = row.ce_inverse = 0;
  }

  // Rows that take step 2 together: the exponentials kept of them have to stay in cache until step 3.
  int64_t batch() const {
    if (p_.classes <= kTile) return std::clamp<int64_t>(kBatchClasses / p_.classes, 1, kBatch);
    return p_.moments ? kBatch : 1;  // what standardises a chunk of classes serves several rows
  }

  // Steps 1 to 3 of some rows.
  void forward_all(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n += batch()) forward(n, std::min(n + batch(), end));
  }

  // Steps 1 to 3 of a batch of rows.
  void forward(int64_t begin, int64_t end) {
    Row<T> rows[kBatch];
    int count = 0;
    for (int64_t n = begin; n < end; ++n) {
      Row<T>& row = rows[count];
      begin_row(row, n, count);
      if (skip(row)) continue;
      ++count;
      if (o_.standardize == Standardize::by_sample) standardize_sample(row);
      place_members(row);
      for (int t = 0; t < o_.terms; ++t) {
        if (!selects(t)) continue;
        scratch_.merged.clear();
        for (int64_t c = 0; c < chunks(); ++c) select(row, t, c, scratch_.merged);
        rank(row, t, scratch_.merged);
      }
    }
    PartialStats total[kBatch];
    for (int64_t c = 0; c < chunks(); ++c)
      for (int i = 0; i < count; ++i) {
        if (c == 0) {
          add_chunk(rows[i], c, total[i]);
        } else {
          PartialStats part;
          add_chunk(rows[i], c, part);
          merge_into(total[i], part);
        }
      }
    BatchStats &stats = scratch_.stats, &of_losses = scratch_.stats_of_few;
    for (int i = 0; i < count; ++i) collect(rows[i], total[i], stats);
    const bool few = sizeof(T) < sizeof(double) && p_.classes <= kFewClasses;
    if (few) of_losses = stats;
    for (int i = 0; i < count && few; ++i) collect_few(rows[i], of_losses);
    finish(rows, count, stats, few ? of_losses : stats);
    if (p_.gradient.data && !p_.moments)
      for (int i = 0; i < count; ++i) gradient(rows[i], 0, p_.classes);
    if (sums_in_forward(p_)) add_class_sums(rows, count, 0, p_.classes);
  }

  // Step 3 of some classes of a row, from what was saved.
  void backward(int64_t sample, int64_t begin, int64_t end) {
    Row<T> row;
    begin_row(row, sample, 0);
    if (restore(row)) {
      gradient(row, begin, end);
    } else {
      clear(row, begin, end);
    }
  }

  // Adds some rows' shares in the sums over samples of some classes, at most a tile. Where there is a gradient to
  // write, it is left there as it is in the standardised logits.
  void add_class_sums(const Row<T>* rows, int count, int64_t begin, int64_t end) {
    auto& sums = GradientSums<T>::of_this_thread();
    const ClassAffines<T> affine = by_class_[0].from(begin);
    const T *logits[GradientSums<T>::kGroup], *gradients[GradientSums<T>::kGroup];
    const bool stays = in_place(p_);
    for (int i = 0; i < count; ++i) {
      T* out = stays ? static_cast<T*>(rows[i].gradient) + begin : scratch_.gradient;
      compute_lead_gradients(rows[i]);
      const Ahead next = i + 1 < count ? with_gradient(ahead(rows[i + 1], begin), rows[i + 1], begin) : Ahead{};
      logits[i] = term_gradient(rows[i], begin, end, out, next).student.logits;
      gradients[i] = out;
      if (!stays) sums.add(logits + i, gradients + i, 1, affine);
    }
    if (stays) sums.add(logits, gradients, count, affine);
  }

  // The same for rows from `first` on, from what was saved.
  void add_class_sums(int64_t first, int64_t last, int64_t begin, int64_t end) {
    Row<T> rows[GradientSums<T>::kGroup];
    int held = 0;
    for (int64_t n = first; n < last; ++n) {
      begin_row(rows[held], n, held);
      if (restore(rows[held]) && rows[held].weight != 0) ++held;
      if (held == GradientSums<T>::kGroup || (n == last - 1 && held > 0)) {
        add_class_sums(rows, held, begin, end);
        held = 0;
      }
    }
  }

  // Finishes the gradients of some classes of rows from `first` on that add_class_sums left behind; the last rows,
  // which are still in cache, come first.
  void chain_classes(int64_t first, int64_t last, int64_t begin, int64_t end) {
    Row<T> rows[kBatch];
    const T* logits[kBatch];
    T* gradients[kBatch];
    int held = 0;
    for (int64_t n = last; n-- > first;) {
      begin_row(rows[held], n, held);
      if (restore(rows[held])) ++held;  // else the gradient is 0 already
      if (held < kBatch && n > first) continue;
      for (int64_t at = begin; at < end; at += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(end - at, kTile));
        for (int i = 0; i < held; ++i) {
          logits[i] = source(rows[i], 0, at, count).logits;  // in place
          gradients[i] = static_cast<T*>(rows[i].gradient) + at;
        }
        by_class_.apply_chain(logits, held, at, count, gradients);
        for (int i = 0; i < held && o_.has_ce(); ++i)
          add_ce_gradient(rows[i], {at, count, {logits[i]}, {}}, gradients[i]);
      }
      for (int i = 0; i < held && end == p_.classes; ++i) clear(rows[i], p_.classes, p_.gradient_classes);
      held = 0;
    }
  }

  // Handles a sample that does not count; false if it does.
  bool skip(Row<T>& row) {
    if (p_.weight(row.sample) != 0) return false;
    std::fill_n(values(row), value_count(p_), 0.0);
    if (p_.saved) std::fill_n(saved(row), saved_size(o_), T(0));
    if (p_.members) std::fill_n(p_.members + row.sample * members_size(o_), members_size(o_), 0);
    if (row.gradient) clear(row, 0, p_.classes);
    return true;
  }

  // That of the origins in the statistics of a term (see stats.h).
  double unit(int t) const { return exponent_[t]; }

  bool selects(int t) const { return o_.term[t].by_rank() && !repeats(t); }

  // Points each term at its leading classes: the target, or room for those still to be selected.
  void place_members(Row<T>& row) {
    int64_t* next;
    if (p_.members) {
      next = p_.members + row.sample * members_size(o_);
    } else {
      scratch_.members.resize(kBatch * members_size(o_));
      next = scratch_.members.data() + row.lane * members_size(o_);
    }
    for (int t = 0; t < o_.terms; ++t) {
      row.members[t] = o_.term[t].kind == PartitionKind::target ? const_cast<int64_t*>(p_.target + row.sample) : next;
      if (o_.term[t].by_rank()) next += o_.term[t].k;
    }
  }

  // Appends the k best classes of a chunk, by the teacher.
  void select(const Row<T>& row, int t, int64_t chunk, Ranking<T>& best) {
    const auto select_from = o_.term[t].largest ? &Worker::select_from<true> : &Worker::select_from<false>;
    (this->*select_from)(row, o_.term[t].k, chunk, best);
  }

  template <bool Largest>
  void select_from(const Row<T>& row, int k, int64_t chunk, Ranking<T>& best) {
    auto& found = scratch_.found;
    found.clear();
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    // Sorted after each tile, or, where that is dear, whenever as many have come again.
    const size_t enough = k, sorted_from = k <= kTile / 32 ? 0 : 2 * enough;
    T least = -INFINITY;
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(end - begin, kTile));
      const Ranked<T, Largest> ranked{teacher_logits(row, begin, count)};
      const T bound = least > -INFINITY ? least : lower_bound_of_best(ranked, count, k);
      each_not_below(ranked, count, bound, [&](int i) { found.push_back(key_of(ranked[i], begin + i)); });
      if (found.size() < sorted_from && begin + kTile < end) continue;
      keep_best(found, k);
      if (found.size() == enough) least = value_of<T>(found.back());
    }
    if (best.empty()) {
      best.swap(found);
    } else {
      best.insert(best.end(), found.begin(), found.end());
    }
  }

  // Settles which classes lead, from the best of all chunks.
  void rank(Row<T>& row, int t, Ranking<T>& best) {
    if (best.size() > static_cast<size_t>(o_.term[t].k)) keep_best(best, o_.term[t].k);  // else of one chunk: sorted
    for (int i = 0; i < o_.term[t].k; ++i) row.members[t][i] = index_of<T>(best[i]);
    for (int other = t + 1; other < o_.terms; ++other)
      if (repeats(other)) std::copy_n(row.members[t], o_.term[t].k, row.members[other]);
  }

  // Step 1 for the rest groups of one chunk.
  void add_chunk(const Row<T>& row, int64_t chunk, PartialStats& stats) {
    const int64_t end = std::min(p_.classes, (chunk + 1) * kChunk);
    bool careful[kMaxTerms] = {};
    for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
      const Tile<T> tile = load_tile(row, begin, end);
      if (o_.has_ce() && !sweeps_.softmax()) add_softmax(raw_student(row, tile), {tile.count}, stats.ce);
      for (int t = 0; t < o_.terms; ++t) {
        if (!sweeps_.has(t)) continue;
        const Classes classes = rest_classes(row, t, tile);
        Ahead next = ahead(row, begin + tile.count);
        if (p_.classes <= kTile) next = with_gradient(next, row, 0);  // it follows before anything else
        const Exps<T> exps = kept(row, t, begin);
        SumsTo to{stats.rest[t]};
        if (sweeps_.squares()) to.squares = &stats.rest[sweeps_.follower];
        if (sweeps_.served(t) == Also::softmax) to.softmax = &stats.ce;
        to.squarings = sweeps_.squarings;
        careful[t] = careful[t] || !add_hopefully(t, add_rest_[t], tile, classes, exps, next, to);
        if (careful[t]) add_carefully(t, add_rest_[t], tile, classes, exps, next, to);
        if (kept_[t].student)
          kept_origin_[t][row.lane + begin / kTile] = {stats.rest[t].student_origin, stats.rest[t].teacher_origin};
      }
    }
  }

  // Adds a tile that counts from the origins so far, or from those of its first classes: nearly always good enough, and
  // it spares a search for the maxima. False, and nothing added, where it is not.
  bool add_hopefully(int t, const AddSumsOfTerm& add, const Tile<T>& tile, const Classes& classes, const Exps<T>& exps,
                     const Ahead& next, const SumsTo& to) const {
    GroupStats<double>& stats = to.stats;
    const SumsBefore before(to);
    if (stats.student_origin == -INFINITY || stats.teacher_origin == -INFINITY) {
      Classes first{std::min(classes.count, kLanes<T>), classes.hidden, 0};
      while (first.hidden_count < classes.hidden_count && classes.hidden[first.hidden_count] < first.count)
        ++first.hidden_count;
      count_from_maxima(t, tile, first, to);
    }
    add[false][exps.student != nullptr](tile.student, tile.teacher, classes, exponent_[t], to, exps, next);
    const bool counted = std::isfinite(stats.student_origin) && std::isfinite(stats.teacher_origin);
    const bool others = (!to.squares || plausible(*to.squares)) && (!to.softmax || plausible(to.softmax->sum));
    if (counted && plausible(stats) && others) return true;
    before.restore(to);
    return false;
  }

  // Adds a tile that counts from its maxima.
  void add_carefully(int t, const AddSumsOfTerm& add, const Tile<T>& tile, const Classes& classes, const Exps<T>& exps,
                     const Ahead& next, const SumsTo& to) const {
    count_from_maxima(t, tile, classes, to);
    add[true][exps.student != nullptr](tile.student, tile.teacher, classes, exponent_[t], to, exps, next);
  }

  // Moves the origins up to the maxima of some classes of a tile.
  template <class R>
  void count_from_maxima(int t, const Tile<R>& tile, const Classes& classes, const SumsTo& to) const {
    GroupStats<double>& stats = to.stats;
    const double student = tile_max(tile.student, classes), teacher = tile_max(tile.teacher, classes);
    rebase(stats, std::max(stats.student_origin, student), std::max(stats.teacher_origin, teacher), unit(t));
    if (to.squares) rebase(*to.squares, stats.student_origin, stats.teacher_origin, unit(sweeps_.follower));
    if (to.softmax) rebase(*to.softmax, stats.student_origin, kLog2E);
  }

  void merge_into(PartialStats& into, const PartialStats& part) const {
    for (int t = 0; t < o_.terms; ++t) merge(into.rest[t], part.rest[t], unit(t));
    if (o_.has_ce()) merge(into.ce, part.ce, kLog2E);
  }

  // Takes a row's statistics, those of its leading classes included, into its batch.
  void collect(const Row<T>& row, PartialStats& total, BatchStats& batch) {
    for (int t = 0; t < o_.terms; ++t) {
      const int rest = o_.term[t].groups() - 1;
      const int64_t rest_size = p_.classes - (rest ? o_.term[t].leads() : 0);
      for (int g = 0; g < rest; ++g) {
        GroupStats<double> stats;
        const Tile<double> leads = add_leads(row, t, g, stats);
        if (sweeps_.served(t) == Also::softmax) add_softmax(leads.student.logits, {leads.count}, total.ce);
        set_lane(batch.group[t][g], row.lane, stats);
      }
      const GroupStats<double>& stats = total.rest[sweeps_.squares() ? t : sweeps_.leader(t)];
      set_lane(batch.group[t][rest], row.lane, rest_size == 1 ? only_rest(row, t) : stats);
    }
    batch.ce.origin[row.lane] = total.ce.origin;
    batch.ce.sum[row.lane] = total.ce.sum;
  }

  // The same of few classes, all in double precision, for the loss: a gradient has to go with the exponentials it
  // takes.
  void collect_few(const Row<T>& row, BatchStats& batch) {
    const auto widened = [](const Source<T>& source, int count, double* out) {
      for (int i = 0; i < count; ++i)
        out[i] = source.affine.high ? source.affine(i, source.logits[i]) : source.logits[i];
      return Source<double>{out};
    };
    for (int t = 0; t < o_.terms; ++t) {
      const int rest = o_.term[t].groups() - 1;
      const Tile<T> tile = load_tile(row, 0, p_.classes);
      const Classes classes = rest_classes(row, t, tile);
      if (tile.count - classes.hidden_count == 1) continue;  // exact already
      const Tile<double> wide{0, tile.count, widened(tile.student, tile.count, scratch_.few[0]),
                              widened(tile.teacher, tile.count, scratch_.few[1])};
      GroupStats<double> stats;
      add_few(t, wide, classes, {}, stats);
      set_lane(batch.group[t][rest], row.lane, stats);
    }
  }

  // Step 2 of a batch: losses, their parts and, from statistics that may be others, the gradients' coefficients.
  void finish(Row<T>* rows, int count, const BatchStats& stats, const BatchStats& of_losses) {
    const Doubles log_ce_sum = o_.has_ce() ? log(stats.ce.sum) : Doubles{};
    for (int i = 0; i < count; ++i) {
      Row<T>& row = rows[i];
      row.weight = static_cast<T>(p_.weight(row.sample));
      double ce = 0;
      if (o_.has_ce()) {
        const double origin = stats.ce.origin[i], at_target = value(p_.student, row.student, p_.target[row.sample]);
        ce = log_ce_sum[i] - (at_target - start(origin));
        row.ce_origin = static_cast<T>(origin);  // rounded, which the sum makes good
        row.ce_inverse = static_cast<T>(rebase_factor(double(row.ce_origin), origin, kLog2E) / stats.ce.sum[i]);
      }
      *values(row) = o_.has_ce() ? o_.ce_weight * ce : 0;
      if (p_.parts) values(row)[1] = ce;
    }
    int64_t first_part = 2;
    for (int t = 0; t < o_.terms; ++t) {
      const Term& term = o_.term[t];
      const CentredTermResult<Doubles> result = evaluated(term, stats.group[t], p_.classes, unit(t));
      const CentredTermResult<Doubles> losses =
          &of_losses != &stats ? evaluated(term, of_losses.group[t], p_.classes, unit(t)) : result;
      for (int i = 0; i < count; ++i) {
        Row<T>& row = rows[i];
        *values(row) += losses.loss[i];
        for (int j = 0; j < term.parts() && p_.parts; ++j) values(row)[first_part + j] = losses.parts[j][i];
        for (int g = 0; g < term.groups(); ++g) {
          const GroupStats<Doubles>& of = stats.group[t][g];
          row.group[t][g] = {T(of.student_origin[i]), T(of.teacher_origin[i]),
                             LogitCoefficients<T>::from(result, g, i, unit(t))};
        }
      }
      first_part += term.parts();
    }
    if (p_.saved)
      for (int i = 0; i < count; ++i) save(rows[i]);
  }

  // Step 3 for the classes in [first, end).
  void gradient(const Row<T>& row, int64_t first, int64_t end) {
    const bool direct = p_.gradient.class_stride == 1 && is_arithmetic<T>(p_.gradient.dtype);
    compute_lead_gradients(row);
    const T slope = o_.standardize == Standardize::by_sample ? row.unit_slope * product_sum(row) : 0;
    for (int64_t begin = first; begin < end; begin += kTile) {
      T* out = direct ? static_cast<T*>(row.gradient) + begin : scratch_.gradient;
      const Tile<T> tile = term_gradient(row, begin, end, out, {});
      if (o_.standardize == Standardize::by_class)
        by_class_.apply_chain(&tile.student.logits, 1, begin, tile.count, &out);
      if (o_.standardize == Standardize::by_sample) apply_chain(row, slope, tile, out);
      if (o_.has_ce()) add_ce_gradient(row, tile, out);
      if (!direct) write(p_.gradient, row.gradient, begin, tile.count, scratch_.gradient);
    }
    if (end == p_.classes) clear(row, p_.classes, p_.gradient_classes);
  }

 private:
  void add_ce_gradient(const Row<T>& row, const Tile<T>& tile, T* out) const {
    const T factor = static_cast<T>(o_.ce_weight) * row.weight;
    if (!sweeps_.softmax())
      add_softmax_gradient(raw_student(row, tile), tile.count, row.ce_origin, factor * row.ce_inverse, out);
    const int64_t target = p_.target[row.sample] - tile.begin;
    if (0 <= target && target < tile.count) out[target] -= factor;
  }

  // The terms' gradient in the logits they see, for the tile from `begin` on. Follows compute_lead_gradients(row).
  Tile<T> term_gradient(const Row<T>& row, int64_t begin, int64_t end, T* out, const Ahead& next) {
    const bool ce_reads = o_.has_ce() && !sweeps_.softmax();
    const bool reads_logits = !kept_row_ || ce_reads || o_.standardize != Standardize::none;
    Tile<T> tile{begin, static_cast<int>(std::min<int64_t>(end - begin, kTile)), {}, {}};
    if (reads_logits) tile.student = source(row, 0, begin, tile.count);
    if (!kept_row_) tile.teacher = source(row, 1, begin, tile.count);
    const auto coefficients = [&](int t) {
      const GroupGradient<T> rest = weighed_group(row, t, o_.term[t].groups() - 1);
      return kept_row_ ? from_tile_origin(row, rest, t, begin) : rest.by;
    };
    for (int t = 0; t < o_.terms; ++t) {
      if (!sweeps_.has(t)) continue;
      const GroupGradient<T>& rest = row.group[t][o_.term[t].groups() - 1];
      GradientBy<T> by{coefficients(t)};
      if (sweeps_.follower >= 0) add(sweeps_.squares() ? by.squares : by.by, coefficients(sweeps_.follower));
      by.squarings = sweeps_.squarings;
      if (sweeps_.served(t) == Also::softmax)
        by.softmax = softmax_factor(
            row, kept_row_ ? kept_origin_[t][row.lane + begin / kTile].first : double(rest.student_origin));
      if (kept_row_) {
        rest_gradient_[t].exps(kept(row, t, begin), tile.count, by, out);
      } else {
        rest_gradient_[t].logits(tile.student, tile.teacher, rest_classes(row, t, tile), exponent_[t],
                                 rest.student_origin, rest.teacher_origin, by, out, next);
      }
    }
    for (const auto& [added, index] : scratch_.lead_gradients)
      if (index >= begin && index < begin + tile.count) out[index - begin] += added;
    return tile;
  }

  // A sample's own moments, for both sides.
  void standardize_sample(Row<T>& row) {
    for (int side = 0; side < 2; ++side) {
      const Matrix& matrix = side ? p_.teacher : p_.student;
      Moments<double> moments;
      for (int64_t begin = 0; begin < p_.classes; begin += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(p_.classes - begin, kTile));
        const void* logits = side ? row.teacher : row.student;
        merge(moments, moments_of(read_classes(matrix, logits, begin, count, scratch_.teacher), count));
      }
      const double factor = o_.factor(moments.count, moments.m2);
      row.affine[side] = {moments.mean, factor};
      if (side == 1) continue;
      const double deviation = std::sqrt(moments.m2 / o_.degrees(moments.count));
      row.unit_slope = static_cast<T>(deviation == 0 ? 0 : 1 / (deviation * factor * o_.degrees(moments.count)));
    }
  }

  // The sum of the terms' gradient times the standardised logits of a sample. Follows compute_lead_gradients(row).
  T product_sum(const Row<T>& row) {
    double total = 0;
    for (int64_t begin = 0; begin < p_.classes; begin += kTile) {
      const Tile<T> tile = term_gradient(row, begin, p_.classes, scratch_.gradient, {});
      Vec<T> sum[2]{};
      each_vector<T>({tile.count}, [&](int i, auto lanes, int chain) INLINED {
        const Vec<T> h = tile.student.template at<false>(i, lanes);
        sum[chain] += h == -INFINITY ? Vec<T>{} : h * load(scratch_.gradient + i);
      });
      total += horizontal_sum(sum[0] + sum[1]);
    }
    return static_cast<T>(total);
  }

  // The chain rule through a sample's standardisation. The terms do not change when all its logits move together, so
  // the mean of their gradient is 0.
  void apply_chain(const Row<T>& row, T slope, const Tile<T>& tile, T* gradient) const {
    const Vec<T> slopes = broadcast(slope), factors = broadcast(row.affine[0].factor);
    write_vectors<T, false>({tile.count}, gradient, [&](int i, auto lanes, int) INLINED {
      return chain<T>(load(gradient + i, lanes), tile.student.template at<false>(i, lanes), Vec<T>{}, slopes, factors);
    });
  }

  // The classes of a tile without those that lead in a term. Valid until the next call.
  Classes rest_classes(const Row<T>& row, int t, const Tile<T>& tile) {
    const Term& term = o_.term[t];
    const int leads = term.groups() == 1 ? 0 : term.leads();
    scratch_.unsorted.resize(leads);
    scratch_.hidden.resize(leads);
    int hidden = 0;
    for (int i = 0; i < leads; ++i) {
      const int64_t j = row.members[t][i] - tile.begin;
      scratch_.unsorted[hidden] = static_cast<int>(-j);  // ascending once sorted descending
      hidden += 0 <= j && j < tile.count;
    }
    sort_few(scratch_.unsorted.data(), hidden, scratch_.hidden.data());
    for (int i = 0; i < hidden; ++i) scratch_.hidden[i] = -scratch_.hidden[i];
    return {tile.count, scratch_.hidden.data(), hidden};
  }

  static int64_t kept_arrays(const Objective& objective) {
    const Sweeps sweeps(objective, 0);
    int64_t arrays = 0;
    for (int t = 0; t < objective.terms; ++t)
      if (sweeps.has(t)) arrays += sweeps.reverse(t) ? 3 : 2;
    return arrays;
  }

  // Whether this term's leading classes are those of an earlier term.
  bool repeats(int t) const {
    const Term &term = o_.term[t], &first = o_.term[0];
    return t > 0 && term.by_rank() && first.by_rank() && term.k == first.k && term.largest == first.largest;
  }

  // What the softmax's exponential of a class is multiplied by in the gradient, if it counts from a logit. Where that
  // is -inf, all classes that count from it are masked.
  T softmax_factor(const Row<T>& row, double logit) const {
    if (logit == -INFINITY) return 0;
    const double factor = std::exp2(kLog2E * (logit - start(double(row.ce_origin))));
    return static_cast<T>(o_.ce_weight) * row.weight * row.ce_inverse * static_cast<T>(factor);
  }

  // Of two terms at one temperature, or of one and nothing: their gaps, where they have any, have the same mean.
  static void add(LogitCoefficients<T>& to, const LogitCoefficients<T>& other) {
    to = {to.student + other.student, to.tilt + other.tilt, to.teacher + other.teacher,
          to.tilt != 0 ? to.mean_gap : other.mean_gap};
  }

  void write(const Matrix& matrix, void* row, int64_t begin, int count, const T* from) const {
    with_dtype(matrix.dtype, [&](auto element) {
      auto* to = static_cast<decltype(element)*>(row) + begin * matrix.class_stride;
      if (matrix.class_stride == 1) {
        narrow_all(from, count, to);
      } else {
        for (int i = 0; i < count; ++i) narrow(from[i], to[i * matrix.class_stride]);
      }
    });
  }

  T value(const Matrix& matrix, const void* row, int64_t index) const {
    T result{};
    with_dtype(matrix.dtype, [&](auto element) {
      result = static_cast<T>(widen(static_cast<const decltype(element)*>(row)[index * matrix.class_stride]));
    });
    return result;
  }

  // No gradient for classes in [begin, end); with the last of those compared go those beyond.
  void clear(const Row<T>& row, int64_t begin, int64_t end) const {
    if (end == p_.classes) end = p_.gradient_classes;
    if (begin == end || p_.gradient_is_zero) return;
    with_dtype(p_.gradient.dtype, [&](auto element) {
      auto* to = static_cast<decltype(element)*>(row.gradient);
      for (int64_t i = begin; i < end; ++i) to[i * p_.gradient.class_stride] = decltype(element){};
    });
  }

  // Classes of one side (0 student, 1 teacher) as the terms see them: in place, or in scratch.
  Source<T> source(const Row<T>& row, int side, int64_t begin, int count) const {
    T* to = side ? scratch_.teacher : scratch_.student;
    const T* raw = side ? read_classes(p_.teacher, row.teacher, begin, count, to)
                        : read_classes(p_.student, row.student, begin, count, to);
    switch (o_.standardize) {
      case Standardize::none: break;
      case Standardize::by_class: return {raw, by_class_[side].from(begin)};
      case Standardize::by_sample: standardize(raw, count, row.affine[side], to); return {to};
    }
    return {raw};
  }

  // The teacher's, for a selection.
  const T* teacher_logits(const Row<T>& row, int64_t begin, int count) const {
    const Source<T> teacher = source(row, 1, begin, count);
    if (!teacher.affine.high) return teacher.logits;
    standardize(teacher.logits, count, teacher.affine, scratch_.teacher);
    return scratch_.teacher;
  }

  Tile<T> load_tile(const Row<T>& row, int64_t begin, int64_t end) const {
    const int count = static_cast<int>(std::min<int64_t>(end - begin, kTile));
    return {begin, count, source(row, 0, begin, count), source(row, 1, begin, count)};
  }

  // What the cross entropy sees of a tile.
  const T* raw_student(const Row<T>& row, const Tile<T>& tile) const {
    if (o_.standardize == Standardize::none) return tile.student.logits;
    return read_classes(p_.student, row.student, tile.begin, tile.count, scratch_.raw);
  }

  Exps<T> kept(const Row<T>& row, int t, int64_t begin) const {
    if (!kept_[t].student) return {};
    const int64_t at = row.lane * kept_row_ + begin;
    return {kept_[t].student + at, kept_[t].teacher + at, kept_[t].gap ? kept_[t].gap + at : nullptr};
  }

  // The logits of the classes from `begin` on: of this row or, where rows follow one another in memory, of the next.
  Ahead ahead(const Row<T>& row, int64_t begin) const {
    Ahead next;
    next.student = class_at(p_.student, row.student, begin);
    next.teacher = class_at(p_.teacher, row.teacher, begin);
    next.student_step = class_bytes(p_.student);
    next.teacher_step = class_bytes(p_.teacher);
    return next;
  }
  // The same and the row's gradient, if there is one.
  Ahead with_gradient(Ahead next, const Row<T>& row, int64_t begin) const {
    if (!row.gradient) return next;
    next.gradient = class_at(p_.gradient, row.gradient, begin);
    next.gradient_step = class_bytes(p_.gradient);
    return next;
  }
  static const char* class_at(const Matrix& matrix, const void* row, int64_t j) {
    return static_cast<const char*>(row) + j * matrix.class_stride * dtype_size(matrix.dtype);
  }
  static int64_t class_bytes(const Matrix& matrix) {  // to fetch: of what is side by side only
    return matrix.class_stride == 1 ? dtype_size(matrix.dtype) : 0;
  }

  // The logits of a leading group, in double precision: the roundings of few classes do not average out. After them
  // there is room for a third array of the same size.
  Tile<double> gather(const Row<T>& row, int t, int g) {
    const Term& term = o_.term[t];
    const int64_t* members = row.members[t] + term.group_begin(g);
    const int count = term.group_end(g) - term.group_begin(g), size = padded<double>(count);
    double* sides = scratch_.leads.data(3 * size);
    const auto collect = [&](const Matrix& matrix, const void* logits, double* to) {
      with_dtype(matrix.dtype, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(logits);
        for (int i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[members[i] * matrix.class_stride]));
      });
    };
    collect(p_.student, row.student, sides);
    collect(p_.teacher, row.teacher, sides + size);
    for (int side = 0; side < 2 && o_.standardize != Standardize::none; ++side)
      for (int i = 0; i < count; ++i) {
        double& logit = sides[side * size + i];
        const T raw = static_cast<T>(logit);
        logit = o_.standardize == Standardize::by_class ? by_class_[side](members[i], raw) : row.affine[side](raw);
      }
    return {0, count, {sides}, {sides + size}};
  }

  // Room for the exponentials of a leading group, if any are kept.
  Exps<double> kept_leads(const Row<T>& row, int t, int g) {
    if (!kept_row_) return {};
    const int size = padded<double>(o_.term[t].leads()), groups = kMaxTerms * (kMaxGroups - 1);
    const int slot = 3 * kept_leads_size_, index = row.lane * groups + (kMaxGroups - 1) * t + g;
    double* next = scratch_.kept_leads.data(kBatch * groups * slot) + index * slot;
    return {next, next + size, o_.term[t].wants_reverse() ? next + 2 * size : nullptr};
  }

  // Statistics of a group of one class, whose own logits are the origins.
  static GroupStats<double> single(double student, double teacher) {
    GroupStats<double> stats;
    stats.student_origin = student;
    stats.teacher_origin = teacher;
    stats.student_sum = single_sum(student);
    stats.teacher_sum = single_sum(teacher);
    return stats;
  }

  // Those of the rest group where one class is all that does not lead.
  GroupStats<double> only_rest(const Row<T>& row, int t) const {
    int64_t j = p_.classes * (p_.classes - 1) / 2;
    for (int rank = 0; p_.classes > 1 && rank < o_.term[t].leads(); ++rank) j -= row.members[t][rank];
    const auto seen = [](const Source<T>& of) { return of.affine.high ? of.affine(0, *of.logits) : *of.logits; };
    return single(seen(source(row, 0, j, 1)), seen(source(row, 1, j, 1)));
  }

  // Step 1 for a leading group, which it returns.
  Tile<double> add_leads(const Row<T>& row, int t, int g, GroupStats<double>& stats) {
    const Tile<double> leads = gather(row, t, g);
    if (leads.count == 1) {
      stats = single(*leads.student.logits, *leads.teacher.logits);
    } else {
      add_few(t, leads, {leads.count}, kept_leads(row, t, g), stats);
    }
    return leads;
  }

  // Step 1 for few classes.
  void add_few(int t, const Tile<double>& tile, const Classes& classes, const Exps<double>& exps,
               GroupStats<double>& stats) const {
    count_from_maxima(t, tile, classes, {stats});
    add_few_[t][exps.student != nullptr](tile.student, tile.teacher, classes, exponent_[t], {stats}, exps, {});
  }

  // What the leading classes' gradients get on top of the rest's sweep.
  void compute_lead_gradients(const Row<T>& row) {
    auto& list = scratch_.lead_gradients;
    list.clear();
    for (int t = 0; t < o_.terms; ++t) {
      const Term& term = o_.term[t];
      for (int g = 0; g + 1 < term.groups(); ++g) {
        const GroupGradient<T> group = weighed_group(row, t, g);
        const int count = term.group_end(g) - term.group_begin(g);
        const int64_t* members = row.members[t] + term.group_begin(g);
        const bool in_softmax = sweeps_.served(t) == Also::softmax;
        if (count == 1) {
          const T student = single_sum(group.student_origin), teacher = single_sum(group.teacher_origin);
          T gradient = student * group.by.student - teacher * group.by.teacher;
          if (in_softmax) gradient += softmax_factor(row, value(p_.student, row.student, *members));
          list.emplace_back(gradient, *members);
          continue;
        }
        const int size = padded<double>(count);
        double* out = scratch_.leads.data(3 * size) + 2 * size;
        const Exps<double> exps = kept_leads(row, t, g);
        const Tile<double> leads = !exps.student || in_softmax ? gather(row, t, g) : Tile<double>{};
        const GradientBy<double> by{{group.by.student, group.by.tilt, group.by.teacher, group.by.mean_gap}};
        const GradientOfTerm<double>& gradient = lead_gradient_[term.group[g].reverse != 0];
        if (exps.student) {
          gradient.exps(exps, count, by, out);
        } else {
          gradient.logits(leads.student, leads.teacher, {count}, exponent_[t], group.student_origin,
                          group.teacher_origin, by, out, {});
        }
        if (in_softmax)
          add_softmax_gradient<double>(leads.student.logits, count, row.ce_origin, softmax_factor(row, row.ce_origin),
                                       out);
        for (int i = 0; i < count; ++i) list.emplace_back(static_cast<T>(out[i]), members[i]);
      }
    }
  }

  GroupGradient<T> weighed_group(const Row<T>& row, int t, int g) const {
    GroupGradient<T> group = row.group[t][g];
    for (T* factor : {&group.by.student, &group.by.tilt, &group.by.teacher}) *factor *= row.weight;
    return group;
  }

  // Coefficients for a tile's kept exponentials, which count from the origins of when they were computed.
  LogitCoefficients<T> from_tile_origin(const Row<T>& row, const GroupGradient<T>& group, int t, int64_t begin) const {
    const auto [student_origin, teacher_origin] = kept_origin_[sweeps_.leader(t)][row.lane + begin / kTile];
    const double student_to = group.student_origin, teacher_to = group.teacher_origin;
    const double student = rebase_factor(student_origin, student_to, unit(t));
    const double teacher = rebase_factor(teacher_origin, teacher_to, unit(t));
    const LogitCoefficients<T>& by = group.by;
    if (by.tilt == 0) return {T(student * by.student), 0, T(teacher * by.teacher)};
    const double mean = by.mean_gap - rebase_gap(student_origin, student_to, teacher_origin, teacher_to, 1.0);
    const double level = by.student + by.tilt * (T(mean) - mean);
    return {T(student * level), T(student * by.tilt), T(teacher * by.teacher), T(mean)};
  }

  double* values(const Row<T>& row) const { return p_.values + row.sample * value_count(p_); }

  T* saved(const Row<T>& row) const { return static_cast<T*>(p_.saved) + row.sample * saved_size(o_); }

  void save(const Row<T>& row) const {
    T* out = saved(row);
    *out++ = row.weight;
    *out++ = row.ce_origin;
    *out++ = row.ce_inverse;
    for (int t = 0; t < o_.terms; ++t)
      for (int g = 0; g < o_.term[t].groups(); ++g) {
        const GroupGradient<T>& group = row.group[t][g];
        const LogitCoefficients<T>& by = group.by;
        for (const T number :
             {group.student_origin, group.teacher_origin, by.student, by.tilt, by.teacher, by.mean_gap})
          *out++ = number;
      }
    if (o_.standardize != Standardize::by_sample) return;
    for (const Affine<T>& affine : row.affine)
      for (const T number : {affine.high, affine.factor, affine.offset}) *out++ = number;
    *out = row.unit_slope;
  }

  // Reads what was saved; false if the sample does not count.
  bool restore(Row<T>& row) {
    const T* in = saved(row);
    if (*in == 0) return false;
    row.weight = static_cast<T>(*in++ * p_.weight(row.sample));
    row.ce_origin = *in++;
    row.ce_inverse = *in++;
    for (int t = 0; t < o_.terms; ++t)
      for (int g = 0; g < o_.term[t].groups(); ++g, in += 6)
        row.group[t][g] = {in[0], in[1], {in[2], in[3], in[4], in[5]}};
    if (o_.standardize == Standardize::by_sample) {
      for (Affine<T>& affine : row.affine) {
        affine.high = *in++;
        affine.factor = *in++;
        affine.offset = *in++;
      }
      row.unit_slope = *in;
    }
    place_members(row);
    return true;
  }

  const Problem& p_;
  const Objective& o_;
  const Sweeps sweeps_;
  const ClassStandardization<T>& by_class_;
  Scratch<T>& scratch_;
  T exponent_[kMaxTerms];
  AddSumsOfTerm add_rest_[kMaxTerms];
  std::array<AddSums<double>, 2> add_few_[kMaxTerms];  // by whether to keep
  GradientOfTerm<T> rest_gradient_[kMaxTerms];
  GradientOfTerm<double> lead_gradient_[2];  // by whether there is a tilt
  Exps<T> kept_[kMaxTerms];                  // of the batch's first row
  int64_t kept_row_ = 0;                     // from row to row
  int kept_leads_size_ = 0;                  // of one array of a leading group
  // What they count from, a tile; only a batch of one has more than one tile.
  std::array<std::pair<double, double>, kKeptClasses / kTile> kept_origin_[kMaxTerms];
};

// Calls ---------------------------------------------------------------------------------------------------------------

// What comes after forward, from what that saved: weights are in there.
inline Problem from_saved(const Problem& forward) {
  Problem p = forward;
  p.weight = {};
  p.values = nullptr;
  return p;
}

inline int64_t row_grain(const Problem& p) { return std::max<int64_t>(kGrainClasses / (p.classes + 64), 1); }

// Few long rows: the chunks of all rows are spread over threads, step by step.
template <class T>
void forward_split(const Problem& problem, const Parallel& parallel) {
  Problem p = problem;
  std::vector<int64_t> members(p.samples * members_size(p.objective));
  if (!p.members) p.members = members.data();
  const ClassStandardization<T> classes(p, parallel);
  Worker<T> main(p, classes);
  const int64_t chunks = main.chunks();
  std::vector<Row<T>> rows;
  for (int64_t n = 0; n < p.samples; ++n) {
    Row<T> row;
    main.begin_row(row, n, 0);
    if (main.skip(row)) continue;
    main.place_members(row);
    rows.push_back(row);
  }
  const int64_t tasks = static_cast<int64_t>(rows.size()) * chunks;
  const auto each_chunk = [&](auto body) {
    parallel.run(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Worker<T> worker(p, classes);
      for (int64_t i = begin; i < end; ++i) body(worker, i / chunks, i % chunks);
    });
  };
  for (int t = 0; t < p.objective.terms; ++t) {
    if (!main.selects(t)) continue;
    std::vector<Ranking<T>> best(tasks);
    each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) { worker.select(rows[r], t, c, best[r * chunks + c]); });
    for (size_t r = 0; r < rows.size(); ++r) {
      Ranking<T> merged;
      for (int64_t c = 0; c < chunks; ++c) {
        const Ranking<T>& part = best[r * chunks + c];
        merged.insert(merged.end(), part.begin(), part.end());
      }
      main.rank(rows[r], t, merged);
    }
  }
  std::vector<PartialStats> stats(tasks);
  each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) { worker.add_chunk(rows[r], c, stats[r * chunks + c]); });
  for (size_t r = 0; r < rows.size(); ++r) {
    PartialStats total;
    for (int64_t c = 0; c < chunks; ++c) main.merge_into(total, stats[r * chunks + c]);
    BatchStats batch;
    main.collect(rows[r], total, batch);
    main.finish(&rows[r], 1, batch, batch);
  }
  if (p.gradient.data)
    each_chunk([&](Worker<T>& worker, int64_t r, int64_t c) {
      worker.gradient(rows[r], c * kChunk, std::min((c + 1) * kChunk, p.classes));
    });
}

// Classes of a strip: where all samples of fewer stay in L2 until the sums are known, so many.
template <class T>
int64_t strip_of(const Problem& p) {
  if (p.classes > kTile)
    for (int64_t strip = kTile; strip >= kLeastStrip; strip /= 2)
      if (2 * p.samples * strip * static_cast<int64_t>(sizeof(T)) <= kStripBytes) return strip;
  return kTile;
}

// The sums over samples that add(worker, strip_begin, strip_end, sample_begin, sample_end) adds to, block by block: in
// the same order whatever the threads. They finish the gradient where add leaves it in place.
template <class T, class Add>
void add_up_class_sums(const Problem& p, ClassStandardization<T>& classes, const Parallel& parallel, double* out,
                       const Add& add) {
  const Blocks work(p, 1 << 13, strip_of<T>(p));
  const int64_t size = 2 * p.classes;
  std::vector<double> partial(work.blocks > 1 ? work.blocks * size : 0);
  Problem saved = from_saved(p);
  const auto finish = [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    Worker<T>(saved, classes).chain_classes(first, last, begin, end);
  };
  work.each(parallel, false, [&](int64_t begin, int64_t end, int64_t first, int64_t last, int64_t block) {
    auto& sums = GradientSums<T>::of_this_thread();
    sums.start(static_cast<int>(end - begin));
    Worker<T> worker(p, classes);
    add(worker, begin, end, first, last);
    double* to = work.blocks > 1 ? partial.data() + block * size : out;
    sums.write(to + begin, to + p.classes + begin);
    if (work.blocks > 1 || !Worker<T>::in_place(p)) return;
    classes.set_sums(p, out, begin, end);  // these classes are still in cache
    finish(begin, end, 0, p.samples);
  });
  if (work.blocks == 1) return;
  std::fill_n(out, size, 0.0);
  for (int64_t block = 0; block < work.blocks; ++block)
    for (int64_t j = 0; j < size; ++j) out[j] += partial[block * size + j];
  if (!Worker<T>::in_place(p)) return;
  classes.set_sums(p, out, 0, p.classes);
  parallel.run(0, p.samples, row_grain(p), [&](int64_t first, int64_t last) { finish(0, p.classes, first, last); });
}

template <class T>
void saved_class_sums(const Problem& p, ClassStandardization<T>& classes, const Parallel& parallel, double* out) {
  const auto add = [](Worker<T>& worker, int64_t begin, int64_t end, int64_t first, int64_t last) {
    worker.add_class_sums(first, last, begin, end);
  };
  add_up_class_sums(p, classes, parallel, out, add);
}

// Step 3 of all rows, from what was saved.
template <class T>
void gradient_rows(const Problem& p, const ClassStandardization<T>& classes, const Parallel& parallel) {
  // What standardises a chunk of classes serves all samples.
  const int64_t step = p.moments ? kChunk : p.classes;
  parallel.run(0, p.samples, row_grain(p), [&](int64_t first, int64_t last) {
    Worker<T> worker(p, classes);
    for (int64_t begin = 0; begin < p.classes; begin += step)
      for (int64_t n = first; n < last; ++n) worker.backward(n, begin, std::min(begin + step, p.classes));
  });
}

// Forward where classes are standardised, with the sums over samples and, if asked for, the gradient.
template <class T>
void forward_standardized(Problem p, ClassStandardization<T>& classes, const Parallel& parallel) {
  std::unique_ptr<T[]> saved;
  std::unique_ptr<int64_t[]> members;
  std::vector<double> sums;
  if (!p.saved) {
    saved.reset(new T[p.samples * saved_size(p.objective)]);
    members.reset(new int64_t[p.samples * members_size(p.objective)]);
    p.saved = saved.get();
    p.members = members.get();
  }
  if (!p.sums_out) {
    sums.resize(2 * p.classes);
    p.sums_out = sums.data();
  }
  const Matrix gradient = p.gradient;
  const bool in_place = Worker<T>::in_place(p);
  if (!in_place) p.gradient = {};
  if (Worker<T>::sums_in_forward(p)) {
    const auto add = [](Worker<T>& worker, int64_t, int64_t, int64_t first, int64_t last) {
      worker.forward_all(first, last);
    };
    add_up_class_sums(p, classes, parallel, p.sums_out, add);
  } else {
    parallel.run(0, p.samples, row_grain(p),
                 [&](int64_t begin, int64_t end) { Worker<T>(p, classes).forward_all(begin, end); });
    saved_class_sums(from_saved(p), classes, parallel, p.sums_out);
  }
  if (in_place || !gradient.data) return;
  p.gradient = gradient;
  classes.set_sums(p, p.sums_out, 0, p.classes);
  gradient_rows(from_saved(p), classes, parallel);
}

template <class T>
void forward_rows(const Problem& p, const Parallel& parallel) {
  if (p.samples < parallel.threads && Worker<T>::may_split(p)) return forward_split<T>(p, parallel);
  ClassStandardization<T> classes(p, parallel);
  if (p.moments && (p.gradient.data || p.sums_out)) return forward_standardized(p, classes, parallel);
  parallel.run(0, p.samples, row_grain(p),
               [&](int64_t begin, int64_t end) { Worker<T>(p, classes).forward_all(begin, end); });
}

template <class T>
void row_class_sums(const Problem& p, const Parallel& parallel, double* out) {
  ClassStandardization<T> classes(p, parallel);
  saved_class_sums(p, classes, parallel, out);
}

template <class T>
void backward_rows(const Problem& p, const Parallel& parallel) {
  gradient_rows<T>(p, {p, parallel}, parallel);
}
