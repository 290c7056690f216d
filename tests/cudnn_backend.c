/* What cuDNN's front end finds when it looks for libcudnn and libcudart: a library without a kernel, whose four
   functions that matter are Python's. See cudnn_backend.py. */
#include <stddef.h>
#include <string.h>

typedef int (*call)(void *, void *, void *, void *, void *, void *);

call python[4];
long long version;

#define BY_PYTHON(i, name) \
    int name(void *a, void *b, void *c, void *d, void *e, void *f) { return python[i](a, b, c, d, e, f); }

BY_PYTHON(0, cudnnBackendCreateDescriptor)
BY_PYTHON(1, cudnnBackendSetAttribute)
BY_PYTHON(2, cudnnBackendGetAttribute)
BY_PYTHON(3, cudnnBackendExecute)

#define SUCCEEDS(name) \
    int name(void) { return 0; }

SUCCEEDS(cudnnBackendFinalize)
SUCCEEDS(cudnnBackendDestroyDescriptor)
SUCCEEDS(cudnnDestroy)
SUCCEEDS(cudnnSetStream)

size_t cudnnGetVersion(void) { return version; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int status) { return status ? "an error of cudnn_backend.py" : "success"; }
void cudnnGetLastErrorString(char *message, size_t size) { memset(message, 0, size > 0); }
int cudnnCreate(void **handle) { *handle = &version; return 0; }
int cudnnGetStream(void *handle, void **stream) { *stream = NULL; return 0; }

int cudaRuntimeGetVersion(int *number) { *number = 13000; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { memcpy(to, from, n); return 0; }
int cudaMemsetAsync(void *to, int value, size_t n, void *stream) { memset(to, value, n); return 0; }
