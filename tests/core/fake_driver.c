/* A CUDA driver, and of cuBLAS what launches.c asks for, that write down what they are asked for.

   A function is a number whose hexadecimal digits are the sizes of its parameters, from the last to the first: 0x48 has 8 bytes, then 4. */

#include <cuda.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cuGraphAddKernelNode
#undef cuGraphExecKernelNodeSetParams

enum { MOST = 8 };

typedef struct {
    CUDA_KERNEL_NODE_PARAMS params;
    uint64_t values[MOST];
} Node;

struct CUgraph_st {
    Node *nodes[MOST];
    int count;
};

struct CUgraphExec_st {
    Node nodes[MOST];
    Node *made_of[MOST];
    int count;
};

static char log_[1 << 16];
static char failing[64];
static CUresult error;
static int capturing, living;
static _Thread_local CUcontext current = (CUcontext)1;

static void say(const char *format, ...)
{
    size_t end = strlen(log_);
    va_list rest;
    va_start(rest, format);
    vsnprintf(log_ + end, sizeof(log_) - end, format, rest);
    va_end(rest);
}

static CUresult now(const char *name)
{
    return strcmp(failing, name) ? CUDA_SUCCESS : error;
}

static int size_of(CUfunction function, size_t i)
{
    return (uintptr_t)function >> (4 * i) & 15;
}

static void read_values(uint64_t *values, CUfunction function, void **params)
{
    for (int i = 0; size_of(function, i); i++) {
        values[i] = 0;
        memcpy(&values[i], params[i], size_of(function, i));
    }
}

static void show(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, const uint64_t *values)
{
    say(" %lx(%u,%u,%u,%u,%u:", (unsigned long)(uintptr_t)function, x, y, z, threads, shared);
    for (int i = 0; size_of(function, i); i++)
        say(" %lu", (unsigned long)values[i]);
    say(")");
}

const char *fake_log(void) { return log_; }
void fake_clear(void) { log_[0] = 0; }
void fake_fail(const char *name, int how)
{
    strcpy(failing, name);
    error = how;
}
void fake_capture(int whether) { capturing = whether; }
int fake_living(void) { return living; }
void fake_context(long context) { current = (CUcontext)context; }
long fake_current(void) { return (long)current; }

CUresult cuCtxGetCurrent(CUcontext *context)
{
    *context = current;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    current = context;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    *context = (CUcontext)(uintptr_t)(100 + device);
    return now("cuDevicePrimaryCtxRetain");
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    *text = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal address" : "no error";
    return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t i, size_t *offset, size_t *size)
{
    *offset = 0;
    *size = size_of(function, i);
    return *size ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared,
                        CUstream stream, void **params, void **extra)
{
    uint64_t values[MOST];
    if (ty != 1 || tz != 1 || extra)
        return CUDA_ERROR_INVALID_VALUE;
    read_values(values, f, params);
    say("%lu:", (unsigned long)(uintptr_t)stream);
    show(f, x, y, z, threads, shared, values);
    say("\n");
    return now("cuLaunchKernel");
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status)
{
    (void)stream;
    *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return now("cuStreamIsCapturing");
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    static CUstreamCaptureMode current = CU_STREAM_CAPTURE_MODE_GLOBAL;
    CUstreamCaptureMode before = current;
    current = *mode;
    *mode = before;
    say("mode %d\n", (int)current);
    return CUDA_SUCCESS;
}

CUresult cuGraphCreate(CUgraph *graph, unsigned flags)
{
    (void)flags;
    *graph = calloc(1, sizeof(**graph));
    living++;
    return now("cuGraphCreate");
}

CUresult cuGraphDestroy(CUgraph graph)
{
    for (int i = 0; i < graph->count; i++)
        free(graph->nodes[i]);
    free(graph);
    living--;
    say("graph destroyed\n");
    return CUDA_SUCCESS;
}

CUresult cuGraphAddKernelNode_v2(CUgraphNode *node, CUgraph graph, const CUgraphNode *after, size_t count, const CUDA_KERNEL_NODE_PARAMS *params)
{
    Node *made = calloc(1, sizeof(*made));
    made->params = *params;
    read_values(made->values, params->func, params->kernelParams);
    if (count != (graph->count > 0) || (count && *after != (CUgraphNode)graph->nodes[graph->count - 1]))
        return CUDA_ERROR_INVALID_VALUE;
    graph->nodes[graph->count++] = made;
    *node = (CUgraphNode)made;
    return now("cuGraphAddKernelNode");
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long flags)
{
    (void)flags;
    *exec = calloc(1, sizeof(**exec));
    living++;
    for (int i = 0; i < graph->count; i++) {
        (*exec)->nodes[i] = *graph->nodes[i];
        (*exec)->made_of[i] = graph->nodes[i];
    }
    (*exec)->count = graph->count;
    if (now("cuGraphInstantiate") == CUDA_SUCCESS)
        return CUDA_SUCCESS;
    living--;
    free(*exec);
    return now("cuGraphInstantiate");
}

CUresult cuGraphExecDestroy(CUgraphExec exec)
{
    free(exec);
    living--;
    say("exec destroyed\n");
    return CUDA_SUCCESS;
}

CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec exec, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS *params)
{
    if (now("cuGraphExecKernelNodeSetParams") != CUDA_SUCCESS)
        return now("cuGraphExecKernelNodeSetParams");
    for (int i = 0; i < exec->count; i++)
        if (exec->made_of[i] == (Node *)node)
            read_values(exec->nodes[i].values, params->func, params->kernelParams);
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream)
{
    say("%lu: graph", (unsigned long)(uintptr_t)stream);
    for (int i = 0; i < exec->count; i++) {
        const CUDA_KERNEL_NODE_PARAMS *p = &exec->nodes[i].params;
        show(p->func, p->gridDimX, p->gridDimY, p->gridDimZ, p->blockDimX, p->sharedMemBytes, exec->nodes[i].values);
    }
    say("\n");
    return now("cuGraphLaunch");
}

int cublasSetMathMode(void *handle, int mode)
{
    say("%lu: math %d\n", (unsigned long)(uintptr_t)handle, mode);
    return now("cublasSetMathMode");
}

int cublasGemmEx(void *handle, int turned_a, int turned_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int leading_a,
                 const void *b, int type_b, int leading_b, const void *beta, void *c, int type_c, int leading_c, int compute, int algorithm)
{
    say("%lu: %dx%dx%d %g*%lu(%d,%d,%d)*%lu(%d,%d,%d)+%g*%lu(%d,%d) by %d with %d\n", (unsigned long)(uintptr_t)handle, m, n, k,
        *(const float *)alpha, (unsigned long)(uintptr_t)a, turned_a, type_a, leading_a, (unsigned long)(uintptr_t)b, turned_b, type_b,
        leading_b, *(const float *)beta, (unsigned long)(uintptr_t)c, type_c, leading_c, compute, algorithm);
    return now("cublasGemmEx");
}
