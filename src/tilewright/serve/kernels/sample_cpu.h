// The sampler on a CPU: a row by one thread, whose loops are vectors. Included after sample.h.
namespace sample {

struct Thread {
  static constexpr int lane = 0, lanes = 1, part = 0, parts = 1, part_lane = 0, part_lanes = 1;
  Measure* of_parts;
  SAMPLE_FN void sync() const {}
  template <class T>
  SAMPLE_FN T max(T x) const { return x; }
  SAMPLE_FN uint64_t sum(uint64_t x) const { return x; }
  SAMPLE_FN uint64_t part_sum(uint64_t x) const { return x; }
  SAMPLE_FN uint64_t prefix(uint64_t x) const { return x; }
  SAMPLE_FN uint64_t last(uint64_t x) const { return x; }
  SAMPLE_FN int first(bool is_one) const { return is_one ? 0 : -1; }
};

}  // namespace sample

extern "C" __attribute__((visibility("default"))) void stage0(const void* params, int64_t begin, int64_t end) {
  SampleRow* rows = static_cast<SampleRow*>(const_cast<void*>(params));
  sample::Measure of_parts[sample::PARTS];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t size = rows[i].size;
    sample::Key* keys = static_cast<sample::Key*>(__builtin_malloc(size * (sizeof(sample::Key) + sizeof(uint32_t))));
    if (!keys) __builtin_trap();
    sample::sample(sample::Thread{of_parts}, {keys, reinterpret_cast<uint32_t*>(keys + size), size}, rows[i]);
    __builtin_free(keys);
  }
}
