// Choices and row workspaces for loops over lists of coordinates.
namespace tw {

// `condition ? a : b` without a branch, which random lists would mispredict every other time.
template <class T>
TW_INLINE T pick(bool condition, T a, T b) {
  using bits = typename int_of<sizeof(T)>::type;
  bits x, y;
  __builtin_memcpy(&x, &a, sizeof(T));
  __builtin_memcpy(&y, &b, sizeof(T));
  y ^= (x ^ y) & -static_cast<bits>(condition);
  __builtin_memcpy(&a, &y, sizeof(T));
  return a;
}

}  // namespace tw
