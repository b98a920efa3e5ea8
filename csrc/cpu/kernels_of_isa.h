// The kernels of one instruction set (see simd.h): by pixels where samples are next to one another in memory, else by rows.

inline void forward(const Problem& problem, const Parallel& parallel) {
  Problem p = problem;
  if (by_pixels(p)) return (p.double_arithmetic ? run_pixels<double> : run_pixels<float>)(p, parallel, p.sums_out);
  const int64_t width = value_count(p);
  std::vector<double> values(p.values ? 0 : p.samples * width);
  if (!p.values) p.values = values.data();
  (p.double_arithmetic ? forward_rows<double> : forward_rows<float>)(p, parallel);
  if (!p.totals) return;
  std::fill_n(p.totals, width, 0.0);
  for (int64_t n = 0; n < p.samples; ++n) {
    const double weight = p.weight(n);
    for (int64_t v = 0; v < width && weight != 0; ++v) p.totals[v] += weight * p.values[n * width + v];
  }
}

inline void backward(const Problem& p, const Parallel& parallel) {
  if (by_pixels(p)) return (p.double_arithmetic ? run_pixels<double> : run_pixels<float>)(p, parallel, nullptr);
  (p.double_arithmetic ? backward_rows<double> : backward_rows<float>)(p, parallel);
}

inline void class_moments(const Problem& p, const Parallel& parallel, double* out) {
  if (by_pixels(p)) return (p.double_arithmetic ? pixel_moments<double> : pixel_moments<float>)(p, parallel, out);
  (p.double_arithmetic ? row_moments<double> : row_moments<float>)(p, parallel, out);
}

inline void class_sums(const Problem& p, const Parallel& parallel, double* out) {
  if (by_pixels(p)) return (p.double_arithmetic ? run_pixels<double> : run_pixels<float>)(p, parallel, out);
  (p.double_arithmetic ? row_class_sums<double> : row_class_sums<float>)(p, parallel, out);
}

// Plane by plane where samples follow one another in memory, else sample by sample.
inline void scale(const Problem& p, const double* factor, bool per_sample, const Parallel& parallel) {
  const Matrix& matrix = p.gradient;
  const bool planes = p.dims > 0 && p.samples > 0 && matrix.class_stride != 1 && matrix.sample_stride[p.dims - 1] == 1;
  const PixelRuns runs(p, planes ? kMostPixels : 1);
  const int64_t grain = std::max<int64_t>(kGrainClasses / (runs.pixels * (p.classes + 64)), 1);
  parallel.run(0, runs.count, grain, [&](int64_t begin, int64_t end) {
    with_dtype(matrix.dtype, [&](auto type) {
      using Element = decltype(type);
      using T = decltype(widen(type));
      for (int64_t run = begin; run < end; ++run) {
        const int64_t first = runs.first(run);
        auto* samples = static_cast<Element*>(element(p, matrix, first));
        T by[kMostPixels];
        for (int i = 0; i < runs.size(run); ++i) by[i] = static_cast<T>(factor[per_sample ? first + i : 0]);
        for (int64_t j = 0; j < p.gradient_classes; ++j)
          for (int i = 0; i < runs.size(run); ++i) {
            Element& value = samples[j * matrix.class_stride + i];
            narrow(widen(value) * by[i], value);
          }
      }
    });
  });
}

constexpr Kernels kKernels{forward, backward, class_moments, class_sums, scale};
