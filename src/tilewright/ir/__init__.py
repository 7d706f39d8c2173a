"""The intermediate representation: one set of nodes, three levels, a verifier for each.

| level         | statements                  | tensors are read by        |
|---------------|-----------------------------|----------------------------|
| coordinates   | `Assign`                    | `Access(tensor, coords)`   |
| positions     | `For` `Let` `If` `Compute`  | `Load(buffer, index…)`     |
| loops         | … `Store` `Alloc` `Sync` …  | `Load(buffer, (offset,))`  |
"""
