// What the rendered struct `Variant` and its users need: tensors, sinks.
// Read by C++ and CUDA; TW_INLINE comes from either prelude, TW_METHOD from the family.

namespace tw {

// A tensor of a variant, one row for each request or row of q. Elements outside it are 0.
template <class T>
struct Array {
  const T* data;
  int32_t rows, columns;
  TW_METHOD T at(int32_t row, int32_t column) const {
    const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
    return inside ? data[static_cast<int64_t>(row) * columns + column] : T(0);
  }
};

// A row's sink joins its softmax, once, when all of the row's keys are in `largest` and `weight` (the sum
// of exp(score - largest)). Returns the factor of the outputs, which the sink has no part in.
TW_INLINE float add_sink(float sink, float& largest, float& weight) {
  const float before = largest;
  largest = sink > before ? sink : before;
  const float base = largest < -3.4028235e38f ? 0.0f : largest;  // -inf: nothing is seen
  const float keep = tw::exp(before - base);
  weight = weight * keep + tw::exp(sink - base);
  return keep;
}

}  // namespace tw
