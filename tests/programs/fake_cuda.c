/* A CUDA driver for machines without one: its device memory is anonymous pages of the host.
   fake_limit bounds the bytes that are mapped; fake_fail_at makes the n-th call of cuMemMap fail,
   with fake_error. A context is a number: PRIMARY is that of the one device. */

#define _GNU_SOURCE
#include <cuda.h>
#include <stdlib.h>
#include <sys/mman.h>

size_t fake_mapped, fake_created, fake_reserved, fake_limit = (size_t)1 << 40;
size_t fake_context, fake_synchronized_in, fake_error = CUDA_ERROR_OUT_OF_MEMORY, fake_able = 1;
int fake_fail_at, fake_calls, fake_synchronized;
#define PRIMARY 100
static size_t sizes[1024];
static int handles;

CUresult cuInit(unsigned int flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    *value = fake_able && attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    return *context = (CUcontext)fake_context, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    return fake_context = (size_t)context, CUDA_SUCCESS;
}
CUresult cuCtxSynchronize(void) {
    return fake_synchronized++, fake_synchronized_in = fake_context, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)PRIMARY;
    return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuGetErrorName(CUresult result, const char **name) {
    *name = result == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : NULL;
    return CUDA_SUCCESS;
}
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags flags) {
    (void)flags, *size = (size_t)1 << 21;
    return prop->location.id == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr at,
                             unsigned long long flags) {
    (void)alignment, (void)at, (void)flags;
    void *found = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    fake_reserved += size;
    return *address = (CUdeviceptr)found, CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    fake_reserved -= size;
    return munmap((void *)address, size), CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                     const CUmemAllocationProp *prop, unsigned long long flags) {
    (void)prop, (void)flags;
    if (fake_mapped + size > fake_limit) return CUDA_ERROR_OUT_OF_MEMORY;
    sizes[*handle = ++handles % 1024] = size;
    return fake_created += size, CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    return fake_created -= sizes[handle], CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
    (void)handle, (void)flags, (void)offset;
    if (++fake_calls == fake_fail_at) return (CUresult)fake_error;
    fake_mapped += size;
    mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *access,
                        size_t count) {
    if (count != 1 || access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        return CUDA_ERROR_INVALID_VALUE;
    return mprotect((void *)address, size, PROT_READ | PROT_WRITE), CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
    fake_mapped -= size;
    mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return CUDA_SUCCESS;
}
