// The sampler on a CPU: a row by one thread, whose loops are vectors. Included after sample.h.
namespace sample {

struct Thread {
  static constexpr int lane = 0, lanes = 1, part = 0, parts = 1, part_lane = 0, part_lanes = 1;
  Measure* of_parts;
  Key* few_keys;
  uint32_t* few_weights;
  int32_t* count;
  SAMPLE_FN void begin() const { *count = 0; }
  SAMPLE_FN int32_t next() const { return (*count)++; }
  SAMPLE_FN void sync() const {}
  template <class T>
  SAMPLE_FN T max(T x) const { return x; }
  SAMPLE_FN Measure sum(Measure m) const { return m; }
  SAMPLE_FN Measure part_sum(Measure m) const { return m; }
  SAMPLE_FN uint64_t prefix(uint64_t x) const { return x; }
  SAMPLE_FN uint64_t of(uint64_t x, int) const { return x; }
  SAMPLE_FN int first(bool is_one) const { return is_one ? 0 : -1; }
};

}  // namespace sample

extern "C" __attribute__((visibility("default"))) void stage0(const void* params, int64_t begin, int64_t end) {
  SampleRow* rows = static_cast<SampleRow*>(const_cast<void*>(params));
  sample::Measure of_parts[sample::PARTS];
  int32_t count;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t size = rows[i].size, all = size + sample::FEW;
    sample::Key* keys = static_cast<sample::Key*>(__builtin_malloc(all * (sizeof(sample::Key) + sizeof(uint32_t))));
    uint32_t* weights = reinterpret_cast<uint32_t*>(keys + all);
    if (keys) sample::sample(sample::Thread{of_parts, keys + size, weights + size, &count}, {keys, weights, rows[i].size}, rows[i]);
    else rows[i].token = sample::NO_MEMORY;
    __builtin_free(keys);
  }
}
