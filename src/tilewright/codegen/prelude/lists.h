// Choices and row workspaces for loops over lists of coordinates.
namespace tw {

// Both values are computed: on random lists a branch would be mispredicted every other time.
template <class T>
TW_INLINE T pick(bool condition, T a, T b) { return condition ? a : b; }

}  // namespace tw
