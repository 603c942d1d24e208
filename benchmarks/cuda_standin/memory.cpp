// The CUDA runtime without a GPU: the device, which poses as an H100, and its memory, which is the host's.
#include "state.h"

EXPORT void standin_reset() {
  LOCK;
  counters().clear();
  launched().clear();
}
EXPORT void standin_callback(void (*cb)(const char*)) { callback = cb; }
EXPORT void standin_bool(int v) { bool_value = v; }
EXPORT long long standin_count(const char* n) {
  LOCK;
  auto it = counters().find(n);
  return it == counters().end() ? 0 : it->second;
}
EXPORT long long standin_dump(char* out, long long size, int kernels) {
  LOCK;
  std::string s;
  for (auto& p : kernels ? launched() : counters()) s += std::to_string(p.second) + "\t" + p.first + "\n";
  if (size > 0) {
    strncpy(out, s.c_str(), size - 1);
    out[size - 1] = 0;
  }
  return s.size();
}

static void props(cudaDeviceProp* p) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3");
  p->totalGlobalMem = total;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->minor = 0;
  p->textureAlignment = 512;
  p->multiProcessorCount = 132;
  p->unifiedAddressing = 1;
  p->concurrentKernels = 1;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 52428800;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = 232448;
  p->reservedSharedMemPerBlock = 1024;
  p->maxBlocksPerMultiProcessor = 32;
  p->asyncEngineCount = 3;
  p->canMapHostMemory = 1;
  p->managedMemory = 1;
  p->memoryPoolsSupported = 1;
  p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = 1;
}
int attribute(int a) {
  switch (a) {
    case 1:
      return 1024;
    case 2:
    case 3:
      return 1024;
    case 4:
      return 64;
    case 5:
      return 2147483647;
    case 6:
    case 7:
      return 65535;
    case 8:
      return 49152;
    case 9:
      return 65536;
    case 10:
      return 32;
    case 12:
      return 65536;
    case 13:
      return 1980000;
    case 14:
      return 512;
    case 16:
      return 132;
    case 18:
      return 0;
    case 31:
      return 1;
    case 36:
      return 2619000;
    case 37:
      return 5120;
    case 38:
      return 52428800;
    case 39:
      return 2048;
    case 41:
      return 1;
    case 75:
      return 9;
    case 76:
      return 0;
    case 81:
      return 233472;
    case 82:
      return 65536;
    case 83:
      return 1;
    case 95:
      return 1;
    case 97:
      return 232448;
    case 106:
      return 32;
    case 111:
      return 1024;
    case 115:
      return 1;
    case 120:
      return 1;
    case 78:
      return 1;
    case 40:
      return 3;
  }
  return 0;
}
EXPORT cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int) { return cudaSuccess; }
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  props(p);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = attribute((int)a);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int) {
  strncpy(s, "0000:01:00.0", n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  if (a) *a = 0;
  if (b) *b = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) {
  *v = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError() {
  auto e = last;
  last = cudaSuccess;
  return e;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last; }
EXPORT const char* cudaGetErrorString(cudaError_t e) {
  return e == 900   ? "operation not permitted when stream is capturing"
         : e == 2   ? "out of memory"
         : e == 901 ? "capture invalidated"
                    : "fake error";
}
EXPORT const char* cudaGetErrorName(cudaError_t e) {
  return e == 900 ? "cudaErrorStreamCaptureUnsupported" : "cudaErrorFake";
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* sym, void** f, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* r) {
  *f = dlsym(RTLD_DEFAULT, sym);
  if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : cudaErrorSymbolNotFound;
}
static cudaError_t allocate(void** p, size_t n) {
  LOCK;
  if (used + n > total) return fail(cudaErrorMemoryAllocation);
  void* m = mmap(nullptr, n ? n : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  blocks()[(uintptr_t)m] = n;
  used += n;
  *p = m;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMalloc(void** p, size_t n) {
  if (auto e = unsafe("cudaMalloc")) return e;
  count("cudaMalloc");
  count("cudaMalloc bytes", n);
  return allocate(p, n);
}
EXPORT cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return allocate(p, n); }
EXPORT cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  if (auto e = unsafe("cudaFree")) return e;
  LOCK;
  counters()["cudaFree"]++;
  auto it = blocks().find((uintptr_t)p);
  if (it != blocks().end()) {
    munmap(p, it->second ? it->second : 1);
    used -= it->second;
    blocks().erase(it);
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
EXPORT cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  if (auto e = unsafe("cudaHostAlloc")) return e;
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* p) {
  free(p);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  *f = total - used;
  *t = total;
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  LOCK;
  memset(a, 0, sizeof *a);
  auto it = blocks().upper_bound((uintptr_t)p);
  bool dev = false;
  if (it != blocks().begin()) {
    --it;
    dev = (uintptr_t)p < it->first + it->second;
  }
  a->type = dev ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->device = 0;
  a->devicePointer = dev ? (void*)p : nullptr;
  return cudaSuccess;
}
static const char* kinds[] = {"H2H", "H2D", "D2H", "D2D", "default"};
static bool is_dev(const void* p) {
  cudaPointerAttributes a;
  cudaPointerGetAttributes(&a, p);
  return a.type == cudaMemoryTypeDevice;
}
static void copy(void* d, const void* s, size_t n, cudaMemcpyKind k, const void* stream) {
  if (k == cudaMemcpyDefault)
    k = is_dev(d) ? (is_dev(s) ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
                  : (is_dev(s) ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
  std::string name = std::string("memcpy ") + kinds[(int)k];
  bool cap = S(stream)->capturing;
  launch(name, stream, false);
  count((name + " bytes").c_str(), n);
  if (cap) return;
  memmove(d, s, n);
  if (k == cudaMemcpyDeviceToHost && n == 1 && bool_value >= 0) *(char*)d = bool_value;
}
EXPORT cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t st) {
  copy(d, s, n, k, st);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  if (auto e = unsafe("cudaMemcpy")) return e;
  copy(d, s, n, k, nullptr);
  count("syncs");
  tell("cudaMemcpy");
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind k,
                                     cudaStream_t st) {
  for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (char*)s + i * sp, w);
  launch("memcpy2d", st, false);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t st) {
  bool cap = S(st)->capturing;
  launch("memset", st, false);
  if (!cap) memset(d, v, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void* d, int v, size_t n) {
  memset(d, v, n);
  launch("memset", nullptr, false);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  static void* m = calloc(1, 1 << 20);
  *p = m;
  return cudaSuccess;
}
