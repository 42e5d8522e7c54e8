/* The launches of one operator, handed to the driver in one call from Python, and products of matrices handed to cuBLAS.

   plan(kernels, addresses) -> start; start(stream, *addresses)

   kernels: for each (function, x, y, z, threads, shared bytes, parameters), and each parameter is either the bytes of a value or
   (which of the addresses, bytes after it). What differs between two calls are the stream and the addresses, nothing else.

   From the third call on the kernels are nodes of a graph, in a row, if there are not too many graphs: the driver takes some 2 microseconds for
   a graph, and 3 to 4 for each launch. New parameters of a node are for later launches of the graph, so it may still be running. It belongs to
   one stream, since a graph never runs twice at the same time, and goes over to another that is used three times in a row. In others, and while
   a stream is captured, the kernels are launched one after another.

   product(library, handle, device, beta, type, type of c, turned, turned, m, n, k, leading, leading, leading) -> multiply; multiply(a, b, c)

   c = b' a' + beta c of cuBLAS, which goes by columns: c [m, n], b' [m, k] and a' [k, n], each perhaps turned, of these types (cudaDataType), and
   columns that are so far apart; sums in float32. The library is one that the process has loaded, by name. A call of `handle` gives cuBLAS's, for
   this thread and the current stream, which belong to that device. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { COMPUTE_32F = 68, DEFAULT_TENSOR_OP = 99, DEFAULT_MATH = 0 }; /* of library_types.h and cublas_api.h */
enum { PATIENCE = 3, MOST_GRAPHS = 256, MOST_ADDRESSES = 256 };
static const char *const PLAN = "gdn.plan";

static CUresult (*launch_kernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **);
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
static CUresult (*graph_instantiate)(CUgraphExec *, CUgraph, unsigned long long);
static CUresult (*exec_destroy)(CUgraphExec);
static CUresult (*exec_set)(CUgraphExec, CUgraphNode, const CUDA_KERNEL_NODE_PARAMS *);
static CUresult (*graph_launch)(CUgraphExec, CUstream);

static const struct {
    const char *name;
    void *place;
} DRIVER[] = {
    {"cuLaunchKernel", &launch_kernel},
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
    {"cuGraphInstantiateWithFlags", &graph_instantiate},
    {"cuGraphExecDestroy", &exec_destroy},
    {"cuGraphExecKernelNodeSetParams_v2", &exec_set},
    {"cuGraphLaunch", &graph_launch},
};

static const char *const PRODUCT = "gdn.product";

static int graphs; /* that there are */

typedef struct {
    size_t slot;
    Py_ssize_t address;
    uint64_t offset;
} Patch;

typedef struct {
    pthread_mutex_t lock;
    CUcontext context;
    Py_ssize_t kernels, addresses, patches;
    CUDA_KERNEL_NODE_PARAMS *nodes;
    uint64_t *slots; /* of all parameters of all kernels */
    void **pointers; /* to the slots */
    Patch *patch;
    int calls; /* in a row that the graph was not there for */
    int refused;
    CUgraph graph;
    CUgraphNode *handles;
    CUgraphExec exec;
    CUstream stream;
} Plan;

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
    free(plan->nodes);
    free(plan->slots);
    free(plan->pointers);
    free(plan->patch);
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
    for (Py_ssize_t i = 0; i < plan->kernels && result == CUDA_SUCCESS; i++) {
        const CUDA_KERNEL_NODE_PARAMS *k = &plan->nodes[i];
        result = launch_kernel(k->func, k->gridDimX, k->gridDimY, k->gridDimZ, k->blockDimX, 1, 1, k->sharedMemBytes, stream,
                               k->kernelParams, NULL);
    }
    return result;
}

static CUresult make_graph(Plan *plan, CUstream stream)
{
    CUresult result = graph_create(&plan->graph, 0);
    for (Py_ssize_t i = 0; i < plan->kernels && result == CUDA_SUCCESS; i++)
        result = graph_add(&plan->handles[i], plan->graph, i ? &plan->handles[i - 1] : NULL, i > 0, &plan->nodes[i]);
    if (result == CUDA_SUCCESS)
        result = graph_instantiate(&plan->exec, plan->graph, 0);
    if (result != CUDA_SUCCESS)
        plan->exec = NULL;
    plan->stream = stream;
    return result;
}

/* Whether the kernels are a graph that can be launched in this stream now. */
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
    for (Py_ssize_t i = 0; i < plan->kernels; i++)
        if (exec_set(plan->exec, plan->handles[i], &plan->nodes[i]) != CUDA_SUCCESS) {
            plan->refused = 1;
            return 0;
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
    for (Py_ssize_t i = 0; i < plan->patches; i++)
        plan->slots[plan->patch[i].slot] = addresses[plan->patch[i].address] + plan->patch[i].offset;
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
        return PyErr_Format(PyExc_RuntimeError, "CUDA could not launch %zd kernels: %s (%d)", plan->kernels, text ? text : "unknown error", result);
    }
    Py_RETURN_NONE;
}

/* One parameter into its slot; its bytes, or -1 with an exception. */
static Py_ssize_t take(Plan *plan, size_t slot, PyObject *parameter)
{
    if (PyBytes_Check(parameter)) {
        Py_ssize_t size = PyBytes_GET_SIZE(parameter);
        if (size > (Py_ssize_t)sizeof(uint64_t)) {
            PyErr_SetString(PyExc_ValueError, "a value has more than 8 bytes");
            return -1;
        }
        memcpy(&plan->slots[slot], PyBytes_AS_STRING(parameter), size);
        return size;
    }
    Patch *patch = &plan->patch[plan->patches];
    unsigned long long offset;
    if (!PyArg_ParseTuple(parameter, "nK", &patch->address, &offset))
        return -1;
    if (patch->address < 0 || patch->address >= plan->addresses) {
        PyErr_SetString(PyExc_ValueError, "there is no such address");
        return -1;
    }
    patch->slot = slot;
    patch->offset = offset;
    plan->patches++;
    return sizeof(uint64_t);
}

/* One kernel with parameters from this slot on; the slot after them, or -1 with an exception. */
static Py_ssize_t take_kernel(Plan *plan, Py_ssize_t i, Py_ssize_t slot, PyObject *kernel)
{
    CUDA_KERNEL_NODE_PARAMS *node = &plan->nodes[i];
    unsigned long long function;
    PyObject *parameters;
    if (!PyArg_ParseTuple(kernel, "KIIIIIO!", &function, &node->gridDimX, &node->gridDimY, &node->gridDimZ, &node->blockDimX,
                          &node->sharedMemBytes, &PyTuple_Type, &parameters))
        return -1;
    node->func = (CUfunction)(uintptr_t)function;
    node->blockDimY = node->blockDimZ = 1;
    node->kernelParams = &plan->pointers[slot];
    size_t offset, size;
    Py_ssize_t n = PyTuple_GET_SIZE(parameters);
    for (Py_ssize_t j = 0; j < n; j++, slot++) {
        Py_ssize_t taken = take(plan, slot, PyTuple_GET_ITEM(parameters, j));
        if (taken < 0)
            return -1;
        plan->pointers[slot] = &plan->slots[slot];
        if (parameter_info(node->func, j, &offset, &size) != CUDA_SUCCESS || size != (size_t)taken) {
            PyErr_Format(PyExc_ValueError, "parameter %zd of kernel %zd has another size", j, i);
            return -1;
        }
    }
    if (parameter_info(node->func, n, &offset, &size) == CUDA_SUCCESS) {
        PyErr_Format(PyExc_ValueError, "kernel %zd has more than %zd parameters", i, n);
        return -1;
    }
    return slot;
}

static PyMethodDef START = {"start", (PyCFunction)(void (*)(void))start, METH_FASTCALL, "start(stream, *addresses): launch the kernels of a plan."};

static PyObject *make_plan(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *kernels;
    Py_ssize_t addresses, slots = 0, slot = 0;
    if (!PyArg_ParseTuple(args, "O!n", &PyTuple_Type, &kernels, &addresses))
        return NULL;
    if (addresses < 0 || addresses > MOST_ADDRESSES)
        return PyErr_Format(PyExc_ValueError, "expected 0 to %d addresses, got %zd", MOST_ADDRESSES, addresses);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kernels); i++) {
        PyObject *kernel = PyTuple_GET_ITEM(kernels, i);
        if (!PyTuple_Check(kernel) || PyTuple_GET_SIZE(kernel) != 7 || !PyTuple_Check(PyTuple_GET_ITEM(kernel, 6)))
            return PyErr_Format(PyExc_TypeError, "kernel %zd is not (function, x, y, z, threads, shared, parameters)", i);
        slots += PyTuple_GET_SIZE(PyTuple_GET_ITEM(kernel, 6));
    }
    Plan *plan = calloc(1, sizeof(Plan));
    if (!plan)
        return PyErr_NoMemory();
    pthread_mutex_init(&plan->lock, NULL);
    plan->kernels = PyTuple_GET_SIZE(kernels);
    plan->addresses = addresses;
    get_context(&plan->context);
    plan->nodes = calloc(plan->kernels + 1, sizeof(*plan->nodes));
    plan->handles = calloc(plan->kernels + 1, sizeof(*plan->handles));
    plan->slots = calloc(slots + 1, sizeof(*plan->slots));
    plan->pointers = calloc(slots + 1, sizeof(*plan->pointers));
    plan->patch = calloc(slots + 1, sizeof(*plan->patch));
    PyObject *capsule = NULL, *function = NULL;
    if (!plan->nodes || !plan->handles || !plan->slots || !plan->pointers || !plan->patch) {
        PyErr_NoMemory();
    } else {
        for (Py_ssize_t i = 0; i < plan->kernels && slot >= 0; i++)
            slot = take_kernel(plan, i, slot, PyTuple_GET_ITEM(kernels, i));
        if (slot >= 0)
            capsule = PyCapsule_New(plan, PLAN, capsule_free);
    }
    if (!capsule) {
        plan_free(plan);
        return NULL;
    }
    function = PyCFunction_New(&START, capsule);
    Py_DECREF(capsule);
    return function;
}

typedef struct {
    int (*set_math_mode)(void *, int);
    /* cublasGemmEx(handle, turned, turned, m, n, k, alpha, b', type, leading, a', type, leading, beta, c, type, leading, compute type, algorithm) */
    int (*gemm)(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *, void *, int, int,
                int, int);
    PyObject *handle;
    CUcontext context;
    float beta;
    int type, result, turned[2], m, n, k, leading[3];
} Product;

static void product_free(PyObject *capsule)
{
    Product *product = PyCapsule_GetPointer(capsule, PRODUCT);
    Py_DECREF(product->handle);
    free(product);
}

static PyObject *multiply(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Product *p = PyCapsule_GetPointer(self, PRODUCT);
    void *given[3];
    const float one = 1;
    int status;
    if (!p)
        return NULL;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "expected 3 addresses, got %zd arguments", count);
    for (int i = 0; i < 3; i++)
        given[i] = PyLong_AsVoidPtr(args[i]);
    if (PyErr_Occurred())
        return NULL;
    enter(&p->context); /* without one torch warns of it when it is asked for the handle */
    PyObject *number = PyObject_CallNoArgs(p->handle);
    if (!number)
        return NULL;
    void *handle = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = p->set_math_mode(handle, DEFAULT_MATH);
    if (!status)
        status = p->gemm(handle, p->turned[0], p->turned[1], p->m, p->n, p->k, &one, given[1], p->type, p->leading[0], given[0], p->type,
                         p->leading[1], &p->beta, given[2], p->result, p->leading[2], COMPUTE_32F, DEFAULT_TENSOR_OP);
    Py_END_ALLOW_THREADS;
    if (status)
        return PyErr_Format(PyExc_RuntimeError, "cuBLAS could not multiply [%d, %d] by [%d, %d]: status %d", p->n, p->k, p->k, p->m, status);
    Py_RETURN_NONE;
}

static PyMethodDef MULTIPLY = {"multiply", (PyCFunction)(void (*)(void))multiply, METH_FASTCALL, "multiply(a, b, c): c = a b, or added to it."};

static PyObject *make_product(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name;
    int device;
    Product p = {0};
    if (!PyArg_ParseTuple(args, "sOifiiiiiiiiii", &name, &p.handle, &device, &p.beta, &p.type, &p.result, &p.turned[0], &p.turned[1], &p.m, &p.n,
                          &p.k, &p.leading[0], &p.leading[1], &p.leading[2]))
        return NULL;
    void *library = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (!library)
        return PyErr_Format(PyExc_ImportError, "%s is not loaded", name);
    *(void **)&p.set_math_mode = dlsym(library, "cublasSetMathMode");
    *(void **)&p.gemm = dlsym(library, "cublasGemmEx");
    if (!p.set_math_mode || !p.gemm)
        return PyErr_Format(PyExc_ImportError, "%s has no cublasGemmEx or no cublasSetMathMode", name);
    get_context(&p.context);
    /* torch's, in a thread that has not used the device yet; it is never let go, as torch never ends it */
    if (!p.context && retain_primary(&p.context, device) != CUDA_SUCCESS)
        p.context = NULL;
    Product *kept = malloc(sizeof(p));
    if (!kept)
        return PyErr_NoMemory();
    *kept = p;
    PyObject *capsule = PyCapsule_New(kept, PRODUCT, product_free);
    if (!capsule) {
        free(kept);
        return NULL;
    }
    Py_INCREF(kept->handle);
    PyObject *function = PyCFunction_New(&MULTIPLY, capsule);
    Py_DECREF(capsule);
    return function;
}

static PyMethodDef METHODS[] = {
    {"plan", make_plan, METH_VARARGS, "plan(kernels, addresses): how to launch them."},
    {"product", make_product, METH_VARARGS,
     "product(library, handle, device, beta, type, type of c, turned, turned, m, n, k, leading, leading, leading): how to multiply."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "gdn_launches", "Launches handed to the driver in one call.", -1, METHODS};

PyMODINIT_FUNC PyInit_gdn_launches(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver)
        return PyErr_Format(PyExc_ImportError, "%s", dlerror());
    for (size_t i = 0; i < sizeof(DRIVER) / sizeof(*DRIVER); i++) {
        void *function = dlsym(driver, DRIVER[i].name);
        if (!function)
            return PyErr_Format(PyExc_ImportError, "this driver has no %s", DRIVER[i].name);
        memcpy(DRIVER[i].place, &function, sizeof(function));
    }
    return PyModule_Create(&MODULE);
}
