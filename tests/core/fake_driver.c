/* A CUDA driver, and of cuBLAS what products.c asks for, that write down what they are asked for.

   A function is a number whose hexadecimal digits are the sizes of its parameters, from the last to the first: 0x48 has 8 bytes, then 4, each at a
   multiple of its size. What cuBLAS has the GPU do is told by `fake_cublas`. */

#include <cuda.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cuGraphAddKernelNode
#undef cuGraphExecKernelNodeSetParams
#undef cuGraphKernelNodeGetParams
#undef cuGraphNodeGetDependencies
#undef cuStreamDestroy
#undef cuStreamBeginCapture

enum { MOST = 16, BYTES = 96, PREFERRED = 11 };

typedef struct {
    CUgraphNodeType type;
    CUDA_KERNEL_NODE_PARAMS params;
    CUDA_MEMSET_NODE_PARAMS fill;
    uint8_t bytes[BYTES];
    size_t size;
    unsigned cluster, preferred;
    /* As cuBLAS was asked to capture it. */
    void *each[MOST], *extra[5];
    int after; /* the node before the last, and not the last one */
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
static int capturing, living, told;
static size_t unknown_from; /* parameters of kernels of which the driver does not tell */
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

static size_t offset_of(CUfunction function, size_t i)
{
    size_t offset = 0;
    for (size_t j = 0; j <= i; j++) {
        size_t size = size_of(function, j);
        offset = size ? (offset + size - 1) / size * size : offset;
        offset += j < i ? size : 0;
    }
    return offset;
}

/* Of a kernel as it is handed over. Functions without parameters take what they are given. */
static size_t read_bytes(uint8_t *bytes, CUfunction function, void **extra)
{
    size_t size = *(size_t *)extra[3], last = 0;
    while (size_of(function, last))
        last++;
    memset(bytes, 0, BYTES);
    if (extra[0] != CU_LAUNCH_PARAM_BUFFER_POINTER || extra[2] != CU_LAUNCH_PARAM_BUFFER_SIZE || extra[4] != CU_LAUNCH_PARAM_END ||
        size > BYTES || (last && size != offset_of(function, last - 1) + size_of(function, last - 1))) {
        say(" wrong parameters");
        return 0;
    }
    memcpy(bytes, extra[1], size);
    return size;
}

static void show(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, const uint8_t *bytes, size_t size)
{
    say(" %lx(%u,%u,%u,%u,%u:", (unsigned long)(uintptr_t)function, x, y, z, threads, shared);
    if (!size_of(function, 0))
        for (size_t i = 0; i < size; i += 4)
            say(i % 8 && i + 4 < size ? "" : " %lx", i + 4 < size ? *(const uint64_t *)(bytes + i) : *(const uint32_t *)(bytes + i));
    for (int i = 0; size_of(function, i); i++) {
        uint64_t value = 0;
        memcpy(&value, bytes + offset_of(function, i), size_of(function, i));
        say(" %lu", (unsigned long)value);
    }
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
int fake_told(void)
{
    int before = told;
    told = 0;
    return before;
}
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
    if (unknown_from && i >= unknown_from)
        return CUDA_ERROR_NOT_SUPPORTED;
    *offset = offset_of(function, i);
    *size = size_of(function, i);
    return *size ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra)
{
    uint8_t bytes[BYTES];
    if (config->blockDimY != 1 || config->blockDimZ != 1 || params)
        return CUDA_ERROR_INVALID_VALUE;
    say("%lu:", (unsigned long)(uintptr_t)config->hStream);
    size_t size = read_bytes(bytes, f, extra);
    show(f, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->sharedMemBytes, bytes, size);
    for (unsigned i = 0; i < config->numAttrs; i++)
        say(" %d=%u", (int)config->attrs[i].id, config->attrs[i].value.clusterDim.x);
    say("\n");
    return now("cuLaunchKernelEx");
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

static Node *add(CUgraph graph, CUgraphNodeType type)
{
    Node *made = calloc(1, sizeof(*made));
    made->type = type;
    graph->nodes[graph->count++] = made;
    return made;
}

static int is_last(CUgraph graph, const CUgraphNode *after, size_t count)
{
    return count == (graph->count > 0) && (!count || *after == (CUgraphNode)graph->nodes[graph->count - 1]);
}

CUresult cuGraphAddKernelNode_v2(CUgraphNode *node, CUgraph graph, const CUgraphNode *after, size_t count, const CUDA_KERNEL_NODE_PARAMS *params)
{
    if (!is_last(graph, after, count) || params->kernelParams)
        return CUDA_ERROR_INVALID_VALUE;
    Node *made = add(graph, CU_GRAPH_NODE_TYPE_KERNEL);
    made->params = *params;
    made->size = read_bytes(made->bytes, params->func, params->extra);
    *node = (CUgraphNode)made;
    return now("cuGraphAddKernelNode");
}

CUresult cuGraphKernelNodeSetAttribute(CUgraphNode node, CUlaunchAttributeID attribute, const CUlaunchAttributeValue *value)
{
    if (attribute != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && (int)attribute != PREFERRED)
        return CUDA_ERROR_INVALID_VALUE;
    *((int)attribute == PREFERRED ? &((Node *)node)->preferred : &((Node *)node)->cluster) = value->clusterDim.x;
    return now("cuGraphKernelNodeSetAttribute");
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
    told++;
    if (now("cuGraphExecKernelNodeSetParams") != CUDA_SUCCESS)
        return now("cuGraphExecKernelNodeSetParams");
    for (int i = 0; i < exec->count; i++)
        if (exec->made_of[i] == (Node *)node)
            exec->nodes[i].size = read_bytes(exec->nodes[i].bytes, params->func, params->extra);
    return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream)
{
    say("%lu: graph", (unsigned long)(uintptr_t)stream);
    for (int i = 0; i < exec->count; i++) {
        const Node *n = &exec->nodes[i];
        const CUDA_KERNEL_NODE_PARAMS *p = &n->params;
        show(p->func, p->gridDimX, p->gridDimY, p->gridDimZ, p->blockDimX, p->sharedMemBytes, n->bytes, n->size);
        if (n->cluster)
            say(" 4=%u", n->cluster);
        if (n->preferred)
            say(" 11=%u", n->preferred);
    }
    say("\n");
    return now("cuGraphLaunch");
}

/* What cuBLAS does in a capture, by its name in the tests, and the least workspace that it does it with. */
static char does[64];
static size_t least;
static CUstream of_handle, captured;
static size_t workspace_size;
static uint64_t workspace_at;
static CUgraph capture;
static unsigned joins; /* edges to a node, beside the first */
static int captures;

void fake_cublas(const char *what, long least_workspace)
{
    strcpy(does, what);
    least = least_workspace;
    joins = !strcmp(what, "joins");
    unknown_from = !strcmp(what, "unknown parameters") ? 3 : 0;
    captures = 0;
}

static int is(const char *what)
{
    return !strcmp(does, what);
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
    *stream = (CUstream)(uintptr_t)77;
    if (now("cuStreamCreate") == CUDA_SUCCESS)
        living += flags == CU_STREAM_NON_BLOCKING ? 1 : 100;
    return now("cuStreamCreate");
}

CUresult cuStreamDestroy_v2(CUstream stream)
{
    living -= (uintptr_t)stream == 77;
    return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode)
{
    if (captured || mode != CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_ERROR_INVALID_VALUE;
    if (now("cuStreamBeginCapture") == CUDA_SUCCESS) {
        captured = stream;
        cuGraphCreate(&capture, 0);
    }
    return now("cuStreamBeginCapture");
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph)
{
    if (stream != captured)
        return CUDA_ERROR_INVALID_VALUE;
    captured = NULL;
    *graph = capture;
    if (now("cuStreamEndCapture") != CUDA_SUCCESS) {
        cuGraphDestroy(capture);
        *graph = NULL;
    }
    return now("cuStreamEndCapture");
}

CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *count)
{
    *count = graph->count;
    if (nodes)
        memcpy(nodes, graph->nodes, graph->count * sizeof(*nodes));
    return now("cuGraphGetNodes");
}

CUresult cuGraphNodeGetDependencies(CUgraphNode node, CUgraphNode *before, size_t *count)
{
    int i = 0;
    while (capture->nodes[i] != (Node *)node)
        i++;
    *count = i > 0 ? 1 + joins : 0;
    for (size_t j = 0; before && j < *count; j++)
        before[j] = (CUgraphNode)capture->nodes[((Node *)node)->after ? i - 2 : i - 1];
    return now("cuGraphNodeGetDependencies");
}

CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType *type)
{
    *type = ((Node *)node)->type;
    return now("cuGraphNodeGetType");
}

CUresult cuGraphKernelNodeGetParams_v2(CUgraphNode node, CUDA_KERNEL_NODE_PARAMS *params)
{
    *params = ((Node *)node)->params;
    return now("cuGraphKernelNodeGetParams");
}

CUresult cuGraphMemsetNodeGetParams(CUgraphNode node, CUDA_MEMSET_NODE_PARAMS *params)
{
    *params = ((Node *)node)->fill;
    return now("cuGraphMemsetNodeGetParams");
}

CUresult cuGraphKernelNodeGetAttribute(CUgraphNode node, CUlaunchAttributeID attribute, CUlaunchAttributeValue *value)
{
    if (attribute != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && (int)attribute != PREFERRED)
        return CUDA_ERROR_INVALID_VALUE;
    value->clusterDim.x = (int)attribute == PREFERRED ? ((Node *)node)->preferred : ((Node *)node)->cluster;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer)
{
    *(unsigned *)data = 2;
    return attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE && pointer == 0x123456789a00 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuModuleLoadData(CUmodule *module, const void *text)
{
    *module = (CUmodule)(uintptr_t)text;
    return now("cuModuleLoadData");
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name)
{
    *function = now("cuModuleGetFunction") == CUDA_SUCCESS && !strcmp(name, "fill") && strstr((const char *)module, "fill") ? (CUfunction)0x488 : 0;
    return now("cuModuleGetFunction");
}

int cublasSetStream_v2(void *handle, CUstream stream)
{
    of_handle = stream;
    say("%lu: stream %lu\n", (unsigned long)(uintptr_t)handle, (unsigned long)(uintptr_t)stream);
    return now("cublasSetStream");
}

int cublasSetWorkspace_v2(void *handle, void *place, size_t size)
{
    (void)handle;
    workspace_at = (uintptr_t)place;
    workspace_size = size;
    return now("cublasSetWorkspace");
}

int cublasSetMathMode(void *handle, int mode)
{
    say("%lu: math %d\n", (unsigned long)(uintptr_t)handle, mode);
    return now("cublasSetMathMode");
}

static Node *add_kernel(uintptr_t function, unsigned x)
{
    Node *node = add(capture, CU_GRAPH_NODE_TYPE_KERNEL);
    node->params = (CUDA_KERNEL_NODE_PARAMS){(CUfunction)function, x, 2, 3, 128, 1, 1, 640, NULL, NULL, NULL, NULL};
    return node;
}

/* With parameters of which the driver knows nothing, packed in this order by cuBLAS. */
static void add_packed(uintptr_t function, unsigned x, const uint64_t *words, size_t size)
{
    Node *node = add_kernel(function, x);
    node->size = size;
    memcpy(node->bytes, words, size);
    void *extra[] = {CU_LAUNCH_PARAM_BUFFER_SIZE, &node->size, CU_LAUNCH_PARAM_BUFFER_POINTER, node->bytes, CU_LAUNCH_PARAM_END};
    if (is("something unknown"))
        extra[0] = (void *)3;
    memcpy(node->extra, extra, sizeof(extra));
    node->params.extra = node->extra;
    node->cluster = is("its cluster") ? 1 + (words[0] & 31) : 2;
    node->preferred = is("prefers clusters") ? 8 : 0;
    node->params.gridDimY += is("its second dimension") ? words[0] & 16 : 0;
    node->params.blockDimX += is("its threads") ? words[0] & 16 : 0;
    node->params.sharedMemBytes += is("its shared memory") ? words[0] & 16 : 0;
    if (is("no parameters")) {
        node->params.func = (CUfunction)0x84888;
        node->params.extra = NULL;
    }
}

static void add_fill(uint64_t place, size_t width, unsigned value, unsigned element)
{
    Node *node = add(capture, CU_GRAPH_NODE_TYPE_MEMSET);
    node->fill = (CUDA_MEMSET_NODE_PARAMS){.dst = place, .value = value, .elementSize = element, .width = width, .height = 1 + is("rows of zeros")};
}

/* As it is told, from a call with these. */
static void capture_product(uint64_t a, uint64_t b, uint64_t c)
{
    static uint64_t calls;
    uint64_t w = workspace_at, words[] = {a, 0x1234567890, b, c + 64, w + 16, a, 7};
    size_t size = sizeof(words) - 4;
    if (is("nothing"))
        return;
    if (is("kernels by alignment"))
        return add_packed(a & 16 ? 0x100 : 0x200, 5, words, size);
    if (is("its grid"))
        return add_packed(0x100, 5 + (a & 16), words, size);
    if (is("its grid by the last bits"))
        return add_packed(0x100, 1 + (a & 15) + 16 * (b & 15) + 256 * (c & 15), words, size);
    if (is("not all matrices"))
        words[2] = 5;
    if (is("something else each time"))
        words[1] = 0x1234567890 + calls++;
    if (is("another address of the device"))
        words[1] = 0x123456789a00;
    if (is("an address between two words")) {
        memcpy((uint8_t *)words + 12, &c, sizeof(c));
        words[2] = words[2] >> 32 << 32 | 5;
    }
    if (is("an address at the end"))
        words[6] = c >> 8;
    if (is("more than its workspace"))
        size -= workspace_size < least ? 8 : 0;
    if (is("without workspace") || unknown_from) { /* with parameters that the driver knows */
        Node *node = add_kernel(0x84888, 9);
        const uint64_t each[] = {a, b, c, 41, c + 8};
        memcpy(node->bytes, each, sizeof(each));
        for (int i = 0; i < 5; i++)
            node->each[i] = node->bytes + 8 * i;
        node->params.kernelParams = node->each;
        return;
    }
    if (is("no function"))
        return add_packed(0, 5, words, size);
    if (is("too much"))
        for (int i = 0; i < 9; i++)
            add_fill(w, 4, 0, 1);
    else
        add_fill(w + 256, is("fills a lot") ? 1000 : is("fills far too much") ? 1 << 20 : is("no zeros") ? 0 : workspace_size < least ? 12 : 4, is("fills a lot") ? 3 : 0, is("numbers") ? 4 : 1);
    if (is("something that is no kernel"))
        add(capture, CU_GRAPH_NODE_TYPE_HOST);
    if (is("branches")) {
        add_packed(0x200, 1, words, size);
        add_packed(0x300, 1, words, size);
        capture->nodes[2]->after = 1;
        return;
    }
    if (!is("too much"))
        add_packed(0x100, 5, words, size);
    if (is("more the third time") && ++captures == 3)
        add_packed(0x100, 5, words, size);
}

int cublasGemmEx(void *handle, int turned_a, int turned_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int leading_a,
                 const void *b, int type_b, int leading_b, const void *beta, void *c, int type_c, int leading_c, int compute, int algorithm)
{
    if (captured && captured == of_handle) {
        capture_product((uintptr_t)b, (uintptr_t)a, (uintptr_t)c);
        return now("cublasGemmEx");
    }
    say("%lu: %dx%dx%d %g*%lu(%d,%d,%d)*%lu(%d,%d,%d)+%g*%lu(%d,%d) by %d with %d\n", (unsigned long)(uintptr_t)handle, m, n, k,
        *(const float *)alpha, (unsigned long)(uintptr_t)a, turned_a, type_a, leading_a, (unsigned long)(uintptr_t)b, turned_b, type_b,
        leading_b, *(const float *)beta, (unsigned long)(uintptr_t)c, type_c, leading_c, compute, algorithm);
    return now("cublasGemmEx");
}
