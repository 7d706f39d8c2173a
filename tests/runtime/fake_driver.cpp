// A CUDA driver made of host memory, for machines without a GPU.
//
// It is compiled against CUDA's own header, so that the names and arguments which Tilewright passes
// through ctypes meet the real prototypes. Its kernel "axpy" runs when launched, the functions of
// real cubins do nothing; while a stream captures, launches are recorded instead. Anything improper
// is CUDA_ERROR_INVALID_VALUE.

#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#pragma GCC visibility push(default)

namespace {

struct Axpy { float* y; const float* x; float a; int64_t n; };
struct Step {
  unsigned threads; Axpy params; bool runs, overlaps;
  void* to = nullptr; const void* from = nullptr; int value = 0; size_t bytes = 0;  // fill or copy
};
struct Graph { std::vector<Step> steps; };

constexpr int kDevices = 2;
thread_local CUcontext active = nullptr;
thread_local Graph* capturing = nullptr;
thread_local CUstream capture_stream = nullptr;
bool initialised = false;
int smem_allowed = 48 * 1024;
int64_t nodes = 0, overlapping = 0;
int64_t live = 0;  // allocations, streams and graphs not yet given back

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(0x1000L + device); }
const CUfunction kAxpy = reinterpret_cast<CUfunction>(0x77);
const CUfunction kOther = reinterpret_cast<CUfunction>(0x78);
const CUmodule kModule = reinterpret_cast<CUmodule>(0x66);

void execute(const Step& step) {
  if (step.to && step.from) memcpy(step.to, step.from, step.bytes);
  else if (step.to) memset(step.to, step.value, step.bytes);
  if (!step.runs) return;
  for (int64_t i = 0; i < step.params.n && i < step.threads; ++i) {
    step.params.y[i] += step.params.a * step.params.x[i];
  }
}

CUresult take(const Step& step, CUstream stream) {
  if (!active) return CUDA_ERROR_INVALID_CONTEXT;
  if (capturing && stream == capture_stream) capturing->steps.push_back(step);
  else execute(step);
  return CUDA_SUCCESS;
}

// What an attribute asks of a grid: CTAs of a cluster divide it, those that wait for each other fit.
CUresult checked(const CUlaunchConfig& c, const CUlaunchAttribute& a, bool runs, bool* overlaps) {
  switch (a.id) {
    case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
      *overlaps = true;
      return !runs && a.value.programmaticStreamSerializationAllowed == 1
          ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: {
      const auto& d = a.value.clusterDim;
      const unsigned count = d.x * d.y * d.z;
      return count > 0 && count <= 8 && c.gridDimX % d.x == 0 &&
          c.gridDimY % d.y == 0 && c.gridDimZ % d.z == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    }
    case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
      return a.value.cooperative != 1 ? CUDA_ERROR_INVALID_VALUE
          : c.gridDimX * c.gridDimY * c.gridDimZ <= 132 * 32 ? CUDA_SUCCESS
          : CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
}

}  // namespace

extern "C" {

int64_t fake_live() { return live; }
// Launches of the graph that was made last; of these, those that may overlap the one in front.
int64_t fake_nodes() { return nodes; }
int64_t fake_overlapping() { return overlapping; }

CUresult cuInit(unsigned flags) {
  initialised = flags == 0 && !getenv("TILEWRIGHT_FAKE_NO_GPU");
  return initialised ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
CUresult cuDriverGetVersion(int* version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
        : error == CUDA_ERROR_NOT_FOUND ? "CUDA_ERROR_NOT_FOUND"
        : error == CUDA_ERROR_NO_DEVICE ? "CUDA_ERROR_NO_DEVICE"
        : error == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
            ? "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
        : error == CUDA_ERROR_INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : nullptr;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult, const char** text) { *text = "as told"; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { *count = kDevices; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  strncpy(name, "Imaginary H100", length);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute what, CUdevice device) {
  switch (what) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device ? 8 : 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device ? 7 : 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t* bytes, CUdevice) { *bytes = 80ull << 30; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { *context = active; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { active = context; return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (!active) return CUDA_ERROR_INVALID_CONTEXT;
  if (memcmp(image, "\x7f" "ELF", 4) != 0) return CUDA_ERROR_INVALID_VALUE;
  *module = kModule;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* const others[] = {"step", "stage0", "sample_rows", "plan_cuts"};
  bool other = false;
  for (const char* one : others) other |= strcmp(name, one) == 0;
  if (module != kModule || (!other && strcmp(name, "axpy") != 0)) return CUDA_ERROR_NOT_FOUND;
  *function = other ? kOther : kAxpy;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) {
  if ((function != kAxpy && function != kOther) || what != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ||
      value > 232448) return CUDA_ERROR_INVALID_VALUE;
  smem_allowed = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                          void** extra) {
  unsigned grid = config->gridDimX * config->gridDimY * config->gridDimZ;
  unsigned block = config->blockDimX * config->blockDimY * config->blockDimZ;
  const bool runs = function == kAxpy;
  bool overlaps = false;
  if ((!runs && function != kOther) || !grid || !block || block > 1024 || extra ||
      static_cast<int>(config->sharedMemBytes) > smem_allowed) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned n = 0; n < config->numAttrs; ++n) {
    CUresult code = checked(*config, config->attrs[n], runs, &overlaps);
    if (code != CUDA_SUCCESS) return code;
  }
  Step step{grid * block, runs ? *static_cast<Axpy*>(params[0]) : Axpy{}, runs, overlaps};
  return take(step, config->hStream);
}

CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  if (!active || !bytes) return CUDA_ERROR_INVALID_VALUE;
  *address = reinterpret_cast<CUdeviceptr>(aligned_alloc(256, (bytes + 255) / 256 * 256));
  ++live;
  return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
  if (!active) return CUDA_ERROR_INVALID_CONTEXT;
  free(reinterpret_cast<void*>(address));
  --live;
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream) {
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream) {
  memcpy(to, reinterpret_cast<void*>(from), bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return take({0, {}, false, false, reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), 0,
               bytes}, stream);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
  return take({0, {}, false, false, reinterpret_cast<void*>(to), nullptr, value, bytes}, stream);
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute what, CUdeviceptr) {
  if (what != CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<int*>(value) = 1;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  *stream = reinterpret_cast<CUstream>(0x55);
  ++live;
  return CUDA_SUCCESS;
}
CUresult cuStreamDestroy(CUstream) { --live; return CUDA_SUCCESS; }
CUresult cuEventCreate(CUevent* event, unsigned flags) {
  *event = reinterpret_cast<CUevent>(0x44);
  ++live;
  return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream) {
  return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuEventSynchronize(CUevent event) {
  return event && !capturing ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuEventDestroy(CUevent) { --live; return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream) {
  return capturing ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = calloc(1, bytes);
  return *pointer ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFreeHost(void* pointer) {
  free(pointer);
  return CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  if (!stream || mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
  capturing = new Graph;
  capture_stream = stream;
  ++live;
  return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream, CUgraph* graph) {
  *graph = reinterpret_cast<CUgraph>(capturing);
  capturing = nullptr;
  return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  Graph* made = new Graph(*reinterpret_cast<Graph*>(graph));
  nodes = static_cast<int64_t>(made->steps.size());
  overlapping = 0;
  for (const Step& step : made->steps) overlapping += step.overlaps;
  *exec = reinterpret_cast<CUgraphExec>(made);
  ++live;
  return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream) {
  for (const Step& step : reinterpret_cast<Graph*>(exec)->steps) execute(step);
  return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
  delete reinterpret_cast<Graph*>(graph);
  --live;
  return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec exec) {
  delete reinterpret_cast<Graph*>(exec);
  --live;
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_INVALID_VALUE;  // no kernel of these tests has a tensor map
}

}  // extern "C"
