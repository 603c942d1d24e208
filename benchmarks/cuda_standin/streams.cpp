// The CUDA runtime without a GPU: streams, events, capture by the documented rules, and launches.
#include "state.h"

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* s) {
  *s = (cudaStream_t) new Stream;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
  *p = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t s) {
  if (S(s)->capturing) {
    S(s)->invalid = true;
    count("ILLEGAL DURING CAPTURE: cudaStreamQuery");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (S(s)->capturing) {
    S(s)->invalid = true;
    count("ILLEGAL DURING CAPTURE: cudaStreamSynchronize");
    tell("illegal during capture: cudaStreamSynchronize");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  count("syncs");
  tell("cudaStreamSynchronize");
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  if (auto e = unsafe("cudaDeviceSynchronize")) return e;
  count("syncs");
  tell("cudaDeviceSynchronize");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t) new Event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t) new Event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete (Event*)e;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  LOCK;
  Event* v = (Event*)e;
  Stream* t = S(s);
  v->graph = t->capturing ? t->graph : nullptr;
  v->id = t->id;
  v->mode = t->mode;
  counters()["events recorded"]++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t) {
  if (auto e = unsafe("cudaEventQuery")) return e;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) {
  if (auto e = unsafe("cudaEventSynchronize")) return e;
  count("syncs");
  tell("cudaEventSynchronize");
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1.0f;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  LOCK;
  Event* v = (Event*)e;
  Stream* t = S(s);
  counters()["stream waits"]++;
  if (v->graph && !t->capturing) {
    t->capturing = true;
    t->graph = v->graph;
    t->id = v->id;
    t->mode = v->mode;
    capturing_streams.push_back(t);
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t cb, void* d, unsigned) {
  cb(s, cudaSuccess, d);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* d) {
  f(d);
  return cudaSuccess;
}
// capture
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode m) {
  LOCK;
  Stream* t = S(s);
  if (t == &legacy) return fail(cudaErrorStreamCaptureUnsupported);
  t->capturing = true;
  t->invalid = false;
  t->mode = m;
  t->id = next_id++;
  t->graph = new Graph;
  t->origin = true;
  capturing_streams.push_back(t);
  if (m == cudaStreamCaptureModeGlobal) active_global++;
  if (m == cudaStreamCaptureModeThreadLocal) active_here++;
  counters()["captures begun"]++;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  LOCK;
  Stream* t = S(s);
  if (!t->capturing) return fail(cudaErrorIllegalState);
  auto* graph = t->graph;
  bool bad = t->invalid;
  if (t->mode == cudaStreamCaptureModeGlobal) active_global--;
  if (t->mode == cudaStreamCaptureModeThreadLocal) active_here--;
  auto id = t->id;
  for (auto* o : capturing_streams)
    if (o->id == id) {
      o->capturing = false;
      o->graph = nullptr;
    }
  std::vector<Stream*> rest;
  for (auto* o : capturing_streams)
    if (o->capturing) rest.push_back(o);
  capturing_streams = rest;
  counters()["captures ended"]++;
  *g = bad ? nullptr : (cudaGraph_t)graph;
  return bad ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* v) {
  *v = S(s)->capturing ? (S(s)->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive)
                       : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* v, unsigned long long* id,
                                            cudaGraph_t* g, const cudaGraphNode_t** deps,
                                            const cudaGraphEdgeData** edges, size_t* n) {
  cudaStreamIsCapturing(s, v);
  if (id) *id = S(s)->id;
  if (g) *g = (cudaGraph_t)S(s)->graph;
  if (deps) *deps = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  auto o = thread_mode;
  thread_mode = *m;
  *m = o;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  *e = (cudaGraphExec_t)g;
  count("graphs instantiated");
  count("graph nodes", ((Graph*)g)->nodes.size());
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) {
  *n = ((Graph*)g)->nodes.size();
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
  count("graph launches");
  count("kernels inside replayed graphs", ((Graph*)e)->kernels);
  count("nodes inside replayed graphs", ((Graph*)e)->nodes.size());
  return cudaSuccess;
}
// kernels
EXPORT void** __cudaRegisterFatBinary(void*) { return (void**)calloc(1, 64); }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                   int*) {
  LOCK;
  names()[host] = name;
}
struct Call {
  dim3 g, b;
  size_t m;
  void* s;
};
static thread_local std::vector<Call> calls;
EXPORT unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t m, void* s) {
  calls.push_back({g, b, m, s});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* m, void* s) {
  if (calls.empty()) return cudaErrorUnknown;
  auto c = calls.back();
  calls.pop_back();
  *g = c.g;
  *b = c.b;
  *m = c.m;
  *(void**)s = c.s;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3, dim3, void**, size_t, cudaStream_t s) {
  launch(name_of((void*)k), s);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t s) {
  launch(name_of(f), s);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t s) {
  launch(name_of(f), s);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  launch(name_of(f), c->stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = 90;
  a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)calloc(1, 64);
  return cudaSuccess;
}
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void*, cudaHostFn_t, unsigned, unsigned) {
  *o = (cudaUserObject_t)calloc(1, 64);
  return cudaSuccess;
}
