/* Device memory whose pages can be given back while its addresses stay: CUDA's virtual memory.

   Segments belong to numbered pools. torch's MemPool allocates by samebit_vmm_alloc_NNN and frees
   by samebit_vmm_free_NNN, which carry the pool's number because torch passes none (NNN is octal).
   A segment is one range of addresses and, while it is mapped, one physical allocation. */

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>

#define DRIVER(F)                                                                              \
    F(cuMemAddressReserve) F(cuMemAddressFree) F(cuMemCreate) F(cuMemRelease) F(cuMemMap)      \
    F(cuMemUnmap) F(cuMemSetAccess) F(cuMemGetAllocationGranularity) F(cuCtxGetCurrent)        \
    F(cuCtxSetCurrent) F(cuCtxSynchronize) F(cuDevicePrimaryCtxRetain) F(cuGetErrorName)      \
    F(cuInit) F(cuDeviceGetAttribute)

#define TEXT(x) #x
#define SYMBOL(x) TEXT(x) /* with the version that cuda.h gives it */
#define DECLARE(f) static __typeof__(&f) p_##f;
DRIVER(DECLARE)

#define NUM_POOLS 64

typedef struct Segment {
    CUdeviceptr address;
    size_t size;
    int pool, device, mapped;
    struct Segment *next;
} Segment;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Segment *segments;
static int taken[NUM_POOLS];

/* What is wrong, or NULL. To be called first. */
const char *samebit_vmm_open(const char *libcuda) {
    void *library = dlopen(libcuda, RTLD_NOW | RTLD_GLOBAL);
    if (library == NULL) return dlerror();
#define FIND(f) \
    if ((p_##f = (__typeof__(&f))dlsym(library, SYMBOL(f))) == NULL) return dlerror();
    DRIVER(FIND)
    return NULL;
}

const char *samebit_vmm_error(int result) {
    const char *name = NULL;
    p_cuGetErrorName((CUresult)result, &name);
    return name ? name : "an unknown error";
}

/* What keeps a device from having such memory, or NULL. */
const char *samebit_vmm_why_not(int device) {
    int able = 0;
    CUresult result = p_cuInit(0);
    if (result == CUDA_SUCCESS)
        result = p_cuDeviceGetAttribute(
            &able, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device);
    if (result != CUDA_SUCCESS) return samebit_vmm_error(result);
    return able ? NULL : "its driver has no virtual memory management for it";
}

/* A pool that nobody has and that holds nothing; -1 if there is none. */
int samebit_vmm_take(void) {
    int found = -1;
    pthread_mutex_lock(&mutex);
    for (int pool = 0; pool < NUM_POOLS && found < 0; pool++) {
        int empty = !taken[pool];
        for (Segment *s = segments; s && empty; s = s->next) empty = s->pool != pool;
        if (empty) found = pool;
    }
    if (found >= 0) taken[found] = 1;
    pthread_mutex_unlock(&mutex);
    return found;
}

void samebit_vmm_give(int pool) {
    pthread_mutex_lock(&mutex);
    taken[pool] = 0;
    pthread_mutex_unlock(&mutex);
}

/* The driver wants a context in every thread that calls it. */
static CUresult enter(int device) {
    CUcontext context = NULL;
    CUresult result = p_cuCtxGetCurrent(&context);
    if (result != CUDA_SUCCESS || context != NULL) return result;
    result = p_cuDevicePrimaryCtxRetain(&context, device);
    return result == CUDA_SUCCESS ? p_cuCtxSetCurrent(context) : result;
}

/* Wait for all that runs on a device, whichever device the thread is on. */
static void synchronize(int device) {
    CUcontext before = NULL, primary = NULL;
    p_cuCtxGetCurrent(&before);
    if (p_cuDevicePrimaryCtxRetain(&primary, device) != CUDA_SUCCESS) return;
    if (p_cuCtxSetCurrent(primary) == CUDA_SUCCESS) p_cuCtxSynchronize();
    p_cuCtxSetCurrent(before);
}

static CUmemAllocationProp properties(int device) {
    CUmemAllocationProp prop = {0};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.location.id = device;
    return prop;
}

static CUresult map(Segment *s) {
    CUmemAllocationProp prop = properties(s->device);
    CUmemGenericAllocationHandle handle;
    CUresult result = p_cuMemCreate(&handle, s->size, &prop, 0);
    if (result != CUDA_SUCCESS) return result;
    result = p_cuMemMap(s->address, s->size, 0, handle, 0);
    p_cuMemRelease(handle); /* the mapping alone holds the memory from here on */
    if (result != CUDA_SUCCESS) return result;
    CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    result = p_cuMemSetAccess(s->address, s->size, &access, 1);
    if (result != CUDA_SUCCESS)
        p_cuMemUnmap(s->address, s->size);
    else
        s->mapped = 1;
    return result;
}

static CUresult unmap(Segment *s) {
    CUresult result = p_cuMemUnmap(s->address, s->size);
    if (result == CUDA_SUCCESS) s->mapped = 0;
    return result;
}

/* NULL where there is no memory: torch raises. It does not free what it caches before: within
   use_mem_pool it does not try again. */
static void *allocate(int pool, ssize_t size, int device) {
    Segment *s = calloc(1, sizeof *s);
    if (s == NULL) return NULL;
    CUmemAllocationProp prop = properties(device);
    size_t step = 0;
    pthread_mutex_lock(&mutex);
    CUresult result = enter(device);
    if (result == CUDA_SUCCESS)
        result = p_cuMemGetAllocationGranularity(&step, &prop,
                                                 CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    if (result == CUDA_SUCCESS) {
        s->size = ((size_t)size + step - 1) / step * step;
        s->pool = pool;
        s->device = device;
        result = p_cuMemAddressReserve(&s->address, s->size, 0, 0, 0);
    }
    if (result == CUDA_SUCCESS && (result = map(s)) != CUDA_SUCCESS)
        p_cuMemAddressFree(s->address, s->size);
    if (result == CUDA_SUCCESS) {
        s->next = segments;
        segments = s;
    }
    pthread_mutex_unlock(&mutex);
    if (result == CUDA_SUCCESS) return (void *)(uintptr_t)s->address;
    free(s);
    return NULL;
}

static void deallocate(void *address) {
    pthread_mutex_lock(&mutex);
    Segment **place = &segments;
    while (*place && (*place)->address != (CUdeviceptr)(uintptr_t)address)
        place = &(*place)->next;
    Segment *s = *place;
    if (s != NULL) {
        *place = s->next;
        enter(s->device);
        if (s->mapped) {
            synchronize(s->device); /* kernels may still use it, as before a cudaFree */
            unmap(s);
        }
        p_cuMemAddressFree(s->address, s->size);
        free(s);
    }
    pthread_mutex_unlock(&mutex);
}

/* Give a pool's pages back; nothing on the device may use them any more. 0 or the first error. */
int samebit_vmm_release(int pool) {
    CUresult first = CUDA_SUCCESS;
    pthread_mutex_lock(&mutex);
    for (Segment *s = segments; s; s = s->next) {
        if (s->pool != pool || !s->mapped) continue;
        CUresult result = enter(s->device);
        if (result == CUDA_SUCCESS) result = unmap(s);
        if (first == CUDA_SUCCESS) first = result;
    }
    pthread_mutex_unlock(&mutex);
    return (int)first;
}

/* Give a pool pages again, at the same addresses: all, or none and the error. */
int samebit_vmm_resume(int pool) {
    CUresult result = CUDA_SUCCESS;
    pthread_mutex_lock(&mutex);
    Segment *failed = NULL;
    for (Segment *s = segments; s && result == CUDA_SUCCESS; s = s->next) {
        if (s->pool != pool || s->mapped) continue;
        result = enter(s->device);
        if (result == CUDA_SUCCESS) result = map(s);
        if (result == CUDA_SUCCESS)
            s->mapped = 2; /* by this call */
        else
            failed = s;
    }
    for (Segment *s = segments; s; s = s->next) {
        if (s->pool != pool || s->mapped != 2) continue;
        s->mapped = 1;
        if (failed != NULL) unmap(s);
    }
    pthread_mutex_unlock(&mutex);
    return (int)result;
}

/* Bytes of a pool's addresses, or of those among them that have pages. */
uint64_t samebit_vmm_bytes(int pool, int mapped) {
    uint64_t bytes = 0;
    pthread_mutex_lock(&mutex);
    for (Segment *s = segments; s; s = s->next)
        if (s->pool == pool && (s->mapped || !mapped)) bytes += s->size;
    pthread_mutex_unlock(&mutex);
    return bytes;
}

/* Addresses and sizes of up to `capacity` segments of a pool; how many it has. */
int samebit_vmm_segments(int pool, uint64_t *addresses, uint64_t *sizes, int capacity) {
    int count = 0;
    pthread_mutex_lock(&mutex);
    for (Segment *s = segments; s; s = s->next) {
        if (s->pool != pool) continue;
        if (count < capacity) {
            addresses[count] = (uint64_t)s->address;
            sizes[count] = s->size;
        }
        count++;
    }
    pthread_mutex_unlock(&mutex);
    return count;
}

#define PAIR(n)                                                            \
    void *samebit_vmm_alloc_##n(ssize_t size, int device, void *stream) {  \
        (void)stream;                                                      \
        return allocate(n, size, device);                                  \
    }                                                                      \
    void samebit_vmm_free_##n(void *address, size_t size, int device, void *stream) { \
        (void)size, (void)device, (void)stream;                            \
        deallocate(address);                                               \
    }
#define EIGHT(n)                                                        \
    PAIR(n##0) PAIR(n##1) PAIR(n##2) PAIR(n##3) PAIR(n##4) PAIR(n##5)  \
    PAIR(n##6) PAIR(n##7)
EIGHT(00) EIGHT(01) EIGHT(02) EIGHT(03) EIGHT(04) EIGHT(05) EIGHT(06) EIGHT(07)
