/* What an operator has the GPU do, handed to the driver in one call from Python.

   plan(parts, addresses) -> start; start(stream, *addresses)

   Each part is a kernel, (function, x, y, z, threads, shared bytes, parameters), with parameters that are the bytes of a value or (which of the
   addresses, bytes after it); or what cuBLAS has the GPU do (products.c), (nodes, addresses), each of these (which, bytes after it). What differs
   between two calls are the stream and the addresses, nothing else.

   From the third call on all of it is a graph, one kernel after another, if there are not too many graphs: the driver takes some 2 microseconds for
   a graph, and 3 to 4 for each launch. Nodes are told their parameters where these have changed, for later launches, so it may still be running. It belongs to
   one stream, since a graph never runs twice at the same time, and goes over to another that is used three times in a row. In others, and while
   a stream is captured, the kernels are launched one after another. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PATIENCE = 3, MOST_GRAPHS = 256, MOST_ADDRESSES = 256, MOST_ATTRIBUTES = 4, ALIGNMENT = 16 };
static const char *const PLAN = "gdn.plan", *const CHAIN = "gdn.chain";

static CUresult (*launch_kernel)(const CUlaunchConfig *, CUfunction, void **, void **);
static CUresult (*parameter_info)(CUfunction, size_t, size_t *, size_t *);
static CUresult (*get_context)(CUcontext *);
static CUresult (*set_context)(CUcontext);
static CUresult (*retain_primary)(CUcontext *, CUdevice);
static CUresult (*error_string)(CUresult, const char **);
static CUresult (*is_capturing)(CUstream, CUstreamCaptureStatus *);
static CUresult (*exchange_capture_mode)(CUstreamCaptureMode *);
static CUresult (*graph_create)(CUgraph *, unsigned);
static CUresult (*graph_destroy)(CUgraph);
static CUresult (*graph_add)(CUgraphNode *, CUgraph, const CUgraphNode *, size_t, const CUDA_KERNEL_NODE_PARAMS *);
static CUresult (*set_attribute)(CUgraphNode, CUlaunchAttributeID, const CUlaunchAttributeValue *);
static CUresult (*graph_instantiate)(CUgraphExec *, CUgraph, unsigned long long);
static CUresult (*exec_destroy)(CUgraphExec);
static CUresult (*exec_set)(CUgraphExec, CUgraphNode, const CUDA_KERNEL_NODE_PARAMS *);
static CUresult (*graph_launch)(CUgraphExec, CUstream);
/* Of products.c. */
static CUresult (*stream_create)(CUstream *, unsigned);
static CUresult (*stream_destroy)(CUstream);
static CUresult (*begin_capture)(CUstream, CUstreamCaptureMode);
static CUresult (*end_capture)(CUstream, CUgraph *);
static CUresult (*get_nodes)(CUgraph, CUgraphNode *, size_t *);
static CUresult (*get_dependencies)(CUgraphNode, CUgraphNode *, size_t *);
static CUresult (*get_type)(CUgraphNode, CUgraphNodeType *);
static CUresult (*get_kernel)(CUgraphNode, CUDA_KERNEL_NODE_PARAMS *);
static CUresult (*get_fill)(CUgraphNode, CUDA_MEMSET_NODE_PARAMS *);
static CUresult (*get_attribute)(CUgraphNode, CUlaunchAttributeID, CUlaunchAttributeValue *);
static CUresult (*pointer_attribute)(void *, CUpointer_attribute, CUdeviceptr);
static CUresult (*load_module)(CUmodule *, const void *);
static CUresult (*get_function)(CUfunction *, CUmodule, const char *);

static const struct {
    const char *name;
    void *place;
} DRIVER[] = {
    {"cuLaunchKernelEx", &launch_kernel},
    {"cuFuncGetParamInfo", &parameter_info},
    {"cuCtxGetCurrent", &get_context},
    {"cuCtxSetCurrent", &set_context},
    {"cuDevicePrimaryCtxRetain", &retain_primary},
    {"cuGetErrorString", &error_string},
    {"cuStreamIsCapturing", &is_capturing},
    {"cuThreadExchangeStreamCaptureMode", &exchange_capture_mode},
    {"cuGraphCreate", &graph_create},
    {"cuGraphDestroy", &graph_destroy},
    {"cuGraphAddKernelNode_v2", &graph_add},
    {"cuGraphKernelNodeSetAttribute", &set_attribute},
    {"cuGraphInstantiateWithFlags", &graph_instantiate},
    {"cuGraphExecDestroy", &exec_destroy},
    {"cuGraphExecKernelNodeSetParams_v2", &exec_set},
    {"cuGraphLaunch", &graph_launch},
    {"cuStreamCreate", &stream_create},
    {"cuStreamDestroy_v2", &stream_destroy},
    {"cuStreamBeginCapture_v2", &begin_capture},
    {"cuStreamEndCapture", &end_capture},
    {"cuGraphGetNodes", &get_nodes},
    {"cuGraphNodeGetDependencies", &get_dependencies},
    {"cuGraphNodeGetType", &get_type},
    {"cuGraphKernelNodeGetParams_v2", &get_kernel},
    {"cuGraphMemsetNodeGetParams", &get_fill},
    {"cuGraphKernelNodeGetAttribute", &get_attribute},
    {"cuPointerGetAttribute", &pointer_attribute},
    {"cuModuleLoadData", &load_module},
    {"cuModuleGetFunction", &get_function},
};

static int graphs; /* that there are */

/* A kernel. Its parameters lie among the bytes of a chain. */
typedef struct {
    CUDA_KERNEL_NODE_PARAMS kernel;
    unsigned attributes;
    CUlaunchAttribute attribute[MOST_ATTRIBUTES];
    size_t first, size;
    int changed; /* since the graph was told */
    void *extra[5];
} Node;

typedef struct {
    Py_ssize_t node;
    size_t byte;
    Py_ssize_t address;
    uint64_t offset;
} Patch;

/* Kernels, one after another, and which bytes of theirs are addresses. */
typedef struct {
    Py_ssize_t nodes, patches;
    size_t size;
    Node *node;
    Patch *patch;
    uint8_t *bytes;
} Chain;

typedef struct {
    pthread_mutex_t lock;
    CUcontext context;
    Py_ssize_t addresses;
    Chain chain;
    int calls; /* in a row that the graph was not there for */
    int refused;
    CUgraph graph;
    CUgraphNode *handles;
    CUgraphExec exec;
    CUstream stream;
} Plan;

static void chain_clear(Chain *chain)
{
    free(chain->node);
    free(chain->patch);
    free(chain->bytes);
    memset(chain, 0, sizeof(*chain));
}

/* One more node with so many bytes, zeros; NULL without memory. */
static Node *chain_node(Chain *chain, size_t size)
{
    size_t first = (chain->size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Node *nodes = realloc(chain->node, (chain->nodes + 1) * sizeof(*nodes));
    if (nodes)
        chain->node = nodes;
    uint8_t *bytes = realloc(chain->bytes, first + size + 1);
    if (bytes)
        chain->bytes = bytes;
    if (!nodes || !bytes)
        return NULL;
    memset(bytes + chain->size, 0, first + size - chain->size);
    chain->size = first + size;
    Node *node = &nodes[chain->nodes++];
    memset(node, 0, sizeof(*node));
    node->first = first;
    node->size = size;
    return node;
}

/* An address among the bytes of a node. */
static int chain_patch(Chain *chain, Py_ssize_t node, size_t byte, Py_ssize_t address, uint64_t offset)
{
    Patch *patch = realloc(chain->patch, (chain->patches + 1) * sizeof(*patch));
    if (!patch)
        return 0;
    chain->patch = patch;
    patch[chain->patches++] = (Patch){node, byte, address, offset};
    return 1;
}

static void chain_write(Chain *chain, const uint64_t *addresses)
{
    for (Py_ssize_t i = 0; i < chain->patches; i++) {
        const Patch *patch = &chain->patch[i];
        uint64_t value = addresses[patch->address] + patch->offset;
        if (memcmp(chain->bytes + patch->byte, &value, sizeof(value))) {
            memcpy(chain->bytes + patch->byte, &value, sizeof(value));
            chain->node[patch->node].changed = 1;
        }
    }
}

/* Call it after the last node: one more may move the others and their bytes. */
static void chain_settle(Chain *chain)
{
    for (Py_ssize_t i = 0; i < chain->nodes; i++) {
        Node *n = &chain->node[i];
        void *extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, chain->bytes + n->first, CU_LAUNCH_PARAM_BUFFER_SIZE, &n->size, CU_LAUNCH_PARAM_END};
        memcpy(n->extra, extra, sizeof(extra));
        n->kernel.kernelParams = NULL;
        n->kernel.extra = n->extra;
    }
}

static void chain_free(PyObject *capsule)
{
    Chain *chain = PyCapsule_GetPointer(capsule, CHAIN);
    chain_clear(chain);
    free(chain);
}

static void plan_free(Plan *plan)
{
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED; /* some thread may be capturing, whose capture this would end */
    if (plan->graph) {
        exchange_capture_mode(&mode);
        if (plan->exec) {
            exec_destroy(plan->exec);
            __atomic_sub_fetch(&graphs, 1, __ATOMIC_RELAXED);
        }
        graph_destroy(plan->graph);
        exchange_capture_mode(&mode);
    }
    chain_clear(&plan->chain);
    free(plan->handles);
    pthread_mutex_destroy(&plan->lock);
    free(plan);
}

static void capsule_free(PyObject *capsule)
{
    plan_free(PyCapsule_GetPointer(capsule, PLAN));
}

static CUresult one_by_one(Plan *plan, CUstream stream)
{
    CUresult result = CUDA_SUCCESS;
    for (Py_ssize_t i = 0; i < plan->chain.nodes && result == CUDA_SUCCESS; i++) {
        Node *n = &plan->chain.node[i];
        const CUDA_KERNEL_NODE_PARAMS *k = &n->kernel;
        CUlaunchConfig config = {k->gridDimX, k->gridDimY, k->gridDimZ, k->blockDimX, k->blockDimY, k->blockDimZ,
                                 k->sharedMemBytes, stream, n->attribute, n->attributes};
        result = launch_kernel(&config, k->func, NULL, k->extra);
    }
    return result;
}

static CUresult make_graph(Plan *plan, CUstream stream)
{
    CUresult result = graph_create(&plan->graph, 0);
    for (Py_ssize_t i = 0; i < plan->chain.nodes && result == CUDA_SUCCESS; i++) {
        Node *n = &plan->chain.node[i];
        CUgraphNode *made = &plan->handles[i], *before = i ? made - 1 : NULL;
        result = graph_add(made, plan->graph, before, i > 0, &n->kernel);
        n->changed = 0;
        for (unsigned j = 0; j < n->attributes && result == CUDA_SUCCESS; j++)
            result = set_attribute(*made, n->attribute[j].id, &n->attribute[j].value);
    }
    if (result == CUDA_SUCCESS)
        result = graph_instantiate(&plan->exec, plan->graph, 0);
    if (result != CUDA_SUCCESS)
        plan->exec = NULL;
    plan->stream = stream;
    return result;
}

/* Whether it is a graph that can be launched in this stream now. */
static int has_graph(Plan *plan, CUstream stream)
{
    CUstreamCaptureStatus status;
    if (plan->refused || is_capturing(stream, &status) != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_NONE)
        return 0;
    if (!plan->exec) {
        if (++plan->calls < PATIENCE)
            return 0;
        plan->calls = 0;
        if (__atomic_add_fetch(&graphs, 1, __ATOMIC_RELAXED) <= MOST_GRAPHS) {
            CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
            exchange_capture_mode(&mode);
            plan->refused = make_graph(plan, stream) != CUDA_SUCCESS;
            exchange_capture_mode(&mode);
        }
        if (!plan->exec) { /* or there are too many, and it tries again */
            __atomic_sub_fetch(&graphs, 1, __ATOMIC_RELAXED);
            return 0;
        }
        return 1; /* it was made with the parameters of this call */
    }
    if (stream != plan->stream && ++plan->calls < PATIENCE)
        return 0;
    plan->stream = stream;
    plan->calls = 0;
    for (Py_ssize_t i = 0; i < plan->chain.nodes; i++) {
        Node *n = &plan->chain.node[i];
        if (n->changed && exec_set(plan->exec, plan->handles[i], &n->kernel) != CUDA_SUCCESS) {
            plan->refused = 1;
            return 0;
        }
        n->changed = 0;
    }
    return 1;
}

/* The context for what is done again: that of this thread, as callers have made the device of the kernels current if it was not, or that of earlier
   calls in a thread that has not used the device yet. */
static void enter(CUcontext *known)
{
    CUcontext context = NULL;
    get_context(&context);
    if (context)
        __atomic_store_n(known, context, __ATOMIC_RELAXED);
    else
        set_context(__atomic_load_n(known, __ATOMIC_RELAXED));
}

static PyObject *start(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Plan *plan = PyCapsule_GetPointer(self, PLAN);
    uint64_t addresses[MOST_ADDRESSES];
    if (!plan)
        return NULL;
    if (count != plan->addresses + 1)
        return PyErr_Format(PyExc_TypeError, "expected a stream and %zd addresses, got %zd arguments", plan->addresses, count);
    CUstream stream = PyLong_AsVoidPtr(args[0]);
    for (Py_ssize_t i = 0; i < plan->addresses; i++)
        addresses[i] = PyLong_AsUnsignedLongLong(args[i + 1]);
    if (PyErr_Occurred())
        return NULL;
    CUresult result;
    Py_BEGIN_ALLOW_THREADS;
    pthread_mutex_lock(&plan->lock);
    enter(&plan->context);
    chain_write(&plan->chain, addresses);
    result = has_graph(plan, stream) ? graph_launch(plan->exec, stream) : CUDA_ERROR_NOT_FOUND;
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        plan->refused = 1; /* a graph needs memory when it is first launched */
    if (result == CUDA_ERROR_OUT_OF_MEMORY || result == CUDA_ERROR_NOT_FOUND)
        result = one_by_one(plan, stream);
    pthread_mutex_unlock(&plan->lock);
    Py_END_ALLOW_THREADS;
    if (result != CUDA_SUCCESS) {
        const char *text = NULL;
        error_string(result, &text);
        return PyErr_Format(PyExc_RuntimeError, "CUDA could not launch %zd kernels: %s (%d)", plan->chain.nodes, text ? text : "unknown error", result);
    }
    Py_RETURN_NONE;
}

/* Which address, and bytes after it; or 0 with an exception. */
static int take_address(PyObject *pair, Py_ssize_t addresses, Py_ssize_t *address, unsigned long long *offset)
{
    if (!PyArg_ParseTuple(pair, "nK", address, offset))
        return 0;
    if (*address < 0 || *address >= addresses) {
        PyErr_SetString(PyExc_ValueError, "there is no such address");
        return 0;
    }
    return 1;
}

/* One parameter to its bytes; how many these are, or -1 with an exception. */
static Py_ssize_t take(Plan *plan, size_t byte, Py_ssize_t most, PyObject *parameter)
{
    Py_ssize_t address, size = PyBytes_Check(parameter) ? PyBytes_GET_SIZE(parameter) : (Py_ssize_t)sizeof(uint64_t);
    unsigned long long offset;
    if (size != most)
        return size;
    if (PyBytes_Check(parameter)) {
        memcpy(plan->chain.bytes + byte, PyBytes_AS_STRING(parameter), size);
        return size;
    }
    if (!take_address(parameter, plan->addresses, &address, &offset))
        return -1;
    if (!chain_patch(&plan->chain, plan->chain.nodes - 1, byte, address, offset)) {
        PyErr_NoMemory();
        return -1;
    }
    return size;
}

/* One kernel; or 0 with an exception. */
static int take_kernel(Plan *plan, Py_ssize_t i, PyObject *part)
{
    CUDA_KERNEL_NODE_PARAMS kernel = {.blockDimY = 1, .blockDimZ = 1};
    unsigned long long function;
    PyObject *parameters;
    if (!PyArg_ParseTuple(part, "KIIIIIO!", &function, &kernel.gridDimX, &kernel.gridDimY, &kernel.gridDimZ, &kernel.blockDimX,
                          &kernel.sharedMemBytes, &PyTuple_Type, &parameters))
        return 0;
    kernel.func = (CUfunction)(uintptr_t)function;
    size_t offset, size, end = 0;
    Py_ssize_t n = PyTuple_GET_SIZE(parameters), taken;
    for (Py_ssize_t j = 0; j < n && parameter_info(kernel.func, j, &offset, &size) == CUDA_SUCCESS; j++)
        end = offset + size;
    Node *node = chain_node(&plan->chain, end);
    if (!node) {
        PyErr_NoMemory();
        return 0;
    }
    node->kernel = kernel;
    for (Py_ssize_t j = 0; j < n; j++) {
        if (parameter_info(kernel.func, j, &offset, &size) != CUDA_SUCCESS)
            size = 0;
        taken = take(plan, node->first + offset, size, PyTuple_GET_ITEM(parameters, j));
        if (taken < 0)
            return 0;
        if (size != (size_t)taken) {
            PyErr_Format(PyExc_ValueError, "parameter %zd of kernel %zd has another size", j, i);
            return 0;
        }
    }
    if (parameter_info(kernel.func, n, &offset, &size) == CUDA_SUCCESS) {
        PyErr_Format(PyExc_ValueError, "kernel %zd has more than %zd parameters", i, n);
        return 0;
    }
    return 1;
}

/* What cuBLAS has the GPU do, with other addresses; or 0 with an exception. */
static int take_chain(Plan *plan, const Chain *from, PyObject *addresses)
{
    Py_ssize_t before = plan->chain.nodes;
    size_t first = 0;
    for (Py_ssize_t i = 0; i < from->nodes; i++) {
        const Node *given = &from->node[i];
        Node *node = chain_node(&plan->chain, given->size);
        if (!node) {
            PyErr_NoMemory();
            return 0;
        }
        size_t place = node->first;
        *node = *given;
        node->first = place;
        memcpy(plan->chain.bytes + place, from->bytes + given->first, given->size);
        if (i == 0)
            first = place; /* both chains have the same gaps from here on, as all places are aligned */
    }
    for (Py_ssize_t i = 0; i < from->patches; i++) {
        const Patch *patch = &from->patch[i];
        Py_ssize_t address;
        unsigned long long offset;
        if (patch->address >= PyTuple_GET_SIZE(addresses)) {
            PyErr_SetString(PyExc_ValueError, "there are fewer addresses than the nodes need");
            return 0;
        }
        if (!take_address(PyTuple_GET_ITEM(addresses, patch->address), plan->addresses, &address, &offset))
            return 0;
        if (!chain_patch(&plan->chain, before + patch->node, first + patch->byte, address, offset + patch->offset)) {
            PyErr_NoMemory();
            return 0;
        }
    }
    return 1;
}

static int take_part(Plan *plan, Py_ssize_t i, PyObject *part)
{
    PyObject *nodes, *addresses;
    if (!PyTuple_Check(part) || PyTuple_GET_SIZE(part) != 2)
        return take_kernel(plan, i, part);
    if (!PyArg_ParseTuple(part, "OO!", &nodes, &PyTuple_Type, &addresses))
        return 0;
    const Chain *from = PyCapsule_GetPointer(nodes, CHAIN);
    return from && take_chain(plan, from, addresses);
}

static PyMethodDef START = {"start", (PyCFunction)(void (*)(void))start, METH_FASTCALL, "start(stream, *addresses): do what is planned."};

static PyObject *make_plan(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *parts, *capsule = NULL, *function = NULL;
    Py_ssize_t addresses;
    if (!PyArg_ParseTuple(args, "O!n", &PyTuple_Type, &parts, &addresses))
        return NULL;
    if (addresses < 0 || addresses > MOST_ADDRESSES)
        return PyErr_Format(PyExc_ValueError, "expected 0 to %d addresses, got %zd", MOST_ADDRESSES, addresses);
    Plan *plan = calloc(1, sizeof(Plan));
    if (!plan)
        return PyErr_NoMemory();
    pthread_mutex_init(&plan->lock, NULL);
    plan->addresses = addresses;
    get_context(&plan->context);
    int taken = 1;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts) && taken; i++)
        taken = take_part(plan, i, PyTuple_GET_ITEM(parts, i));
    if (taken) {
        chain_settle(&plan->chain);
        plan->handles = calloc(plan->chain.nodes + 1, sizeof(*plan->handles));
        capsule = plan->handles ? PyCapsule_New(plan, PLAN, capsule_free) : PyErr_NoMemory();
    }
    if (!capsule) {
        plan_free(plan);
        return NULL;
    }
    function = PyCFunction_New(&START, capsule);
    Py_DECREF(capsule);
    return function;
}
