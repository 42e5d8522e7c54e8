/* Products of matrices by cuBLAS: asked for without torch, and what cuBLAS has the GPU do in one, as part of a plan (launches.c).

   product(library, handle, device, beta, type, type of c, turned, turned, m, n, k, leading, leading, leading) -> multiply; multiply(a, b, c)

   c = b' a' + beta c of cuBLAS, which goes by columns: c [m, n], b' [m, k] and a' [k, n], each perhaps turned, of these types (cudaDataType), and
   columns that are so far apart; sums in float32. The library is one that the process has loaded, by name. A call of `handle` gives cuBLAS's, for
   this thread and the current stream, which belong to that device.

   nodes(multiply, most, after, after, after) -> (nodes, bytes of workspace) or None

   For a plan, with the addresses of a, b, c and of a workspace. Nothing is computed: calls of cuBLAS with invented addresses, so many bytes after
   a multiple of 16, are captured. What they hand to kernels is not documented, so it is found out and checked: two calls tell which eight bytes
   are an address plus something; of a third one, which also lies differently in memory, all bytes have to be what they tell. None if they are
   not, if cuBLAS chooses kernels by more than these 16 bytes, if it hands over any other address of the device or leaves out one of a, b and c, or
   if it does something else than run kernels and fill a little memory, one after another. Memory is filled by a kernel here, which takes the driver
   a third of the time. `most` bytes of workspace are what torch gives cuBLAS.

   This is one file with launches.c, which comes before it; the module of both is at the end. */

enum { COMPUTE_32F = 68, DEFAULT_TENSOR_OP = 99, DEFAULT_MATH = 0 }; /* of library_types.h and cublas_api.h */
static const char *const PRODUCT = "gdn.product";

typedef struct {
    int (*set_math_mode)(void *, int);
    int (*set_stream)(void *, CUstream);
    int (*set_workspace)(void *, void *, size_t);
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

/* Of the addresses of a, b and c. */
static int gemm_of(const Product *p, void *handle, void *const *given)
{
    const float one = 1;
    return p->gemm(handle, p->turned[0], p->turned[1], p->m, p->n, p->k, &one, given[1], p->type, p->leading[0], given[0], p->type,
                   p->leading[1], &p->beta, given[2], p->result, p->leading[2], COMPUTE_32F, DEFAULT_TENSOR_OP);
}

/* cuBLAS's handle of this thread for the current stream, or NULL with an exception. */
static void *handle_of(Product *p)
{
    enter(&p->context); /* without one torch warns of it when it is asked for the handle */
    PyObject *number = PyObject_CallNoArgs(p->handle);
    if (!number)
        return NULL;
    void *handle = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return handle;
}

static PyObject *multiply(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Product *p = PyCapsule_GetPointer(self, PRODUCT);
    void *given[3], *handle;
    int status;
    if (!p)
        return NULL;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "expected 3 addresses, got %zd arguments", count);
    for (int i = 0; i < 3; i++)
        given[i] = PyLong_AsVoidPtr(args[i]);
    if (PyErr_Occurred())
        return NULL;
    handle = handle_of(p);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = p->set_math_mode(handle, DEFAULT_MATH);
    if (!status)
        status = gemm_of(p, handle, given);
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
    *(void **)&p.set_stream = dlsym(library, "cublasSetStream_v2");
    *(void **)&p.set_workspace = dlsym(library, "cublasSetWorkspace_v2");
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

enum { GIVEN = 4, WORKSPACE = 3, SETS = 3, MOST_NODES = 8, MOST_CONTEXTS = 64, THREADS = 128, MOST_FILLED = 1 << 16 };

/* Addresses of a, b, c and the workspace for three calls. From the first to the second each moves by another distance. */
static const uint64_t INVENTED[SETS][GIVEN] = {
    {0x7f1200000000, 0x7e3400000000, 0x7d5600000000, 0x6f0000000000},
    {0x7a2145600010, 0x7b9876540030, 0x7c1112220050, 0x6f1040000000},
    {0x6a0000000030, 0x5b0123400010, 0x4c00ab000070, 0x6f00c0000100},
};
static const size_t WORKSPACES[] = {1 << 8, 1 << 16, 1 << 20, 1 << 22};
/* Of a launch: cooperative, cluster, how clusters are scheduled, preferred cluster. What else there is changes no result. */
static const CUlaunchAttributeID ATTRIBUTES[MOST_ATTRIBUTES] = {2, 4, 5, 11};

static int read_kernel(CUgraphNode from, Chain *chain)
{
    CUDA_KERNEL_NODE_PARAMS kernel;
    const void *packed = NULL;
    size_t size = 0, count = 0, offset, length;
    if (get_kernel(from, &kernel) != CUDA_SUCCESS || !kernel.func)
        return 0;
    if (kernel.extra) {
        for (void **e = kernel.extra; *e != CU_LAUNCH_PARAM_END; e += 2)
            if (*e == CU_LAUNCH_PARAM_BUFFER_POINTER)
                packed = e[1];
            else if (*e == CU_LAUNCH_PARAM_BUFFER_SIZE)
                size = *(size_t *)e[1];
            else
                return 0;
    } else {
        CUresult result;
        for (; (result = parameter_info(kernel.func, count, &offset, &length)) == CUDA_SUCCESS; count++)
            size = offset + length;
        if (result != CUDA_ERROR_INVALID_VALUE) /* that there are no more */
            return 0;
    }
    if (!size || (!packed && !kernel.kernelParams))
        return 0;
    Node *node = chain_node(chain, size);
    if (!node)
        return 0;
    node->kernel = kernel;
    if (packed)
        memcpy(chain->bytes + node->first, packed, size);
    for (size_t i = 0; i < count && parameter_info(kernel.func, i, &offset, &length) == CUDA_SUCCESS; i++)
        memcpy(chain->bytes + node->first + offset, kernel.kernelParams[i], length);
    static const CUlaunchAttributeValue nothing;
    for (int i = 0; i < MOST_ATTRIBUTES; i++) {
        CUlaunchAttribute *attribute = &node->attribute[node->attributes];
        if (get_attribute(from, ATTRIBUTES[i], &attribute->value) == CUDA_SUCCESS && memcmp(&attribute->value, &nothing, sizeof(nothing))) {
            attribute->id = ATTRIBUTES[i];
            node->attributes++;
        }
    }
    return 1;
}

/* fill(place, width, value): so many bytes, each by a thread. For all GPUs that are supported, and compiled by the driver. */
static const char FILL[] = ".version 7.0\n.target sm_80\n.address_size 64\n"
                           ".visible .entry fill(.param .u64 place, .param .u64 width, .param .u32 value)\n"
                           "{\n.reg .pred %p;\n.reg .b32 %r<4>;\n.reg .b64 %d<4>;\n"
                           "ld.param.u64 %d0, [place];\nld.param.u64 %d1, [width];\nld.param.u32 %r0, [value];\n"
                           "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ntid.x;\nmov.u32 %r3, %tid.x;\n"
                           "mul.wide.u32 %d2, %r1, %r2;\ncvt.u64.u32 %d3, %r3;\nadd.u64 %d2, %d2, %d3;\n"
                           "setp.ge.u64 %p, %d2, %d1;\n@%p ret;\n"
                           "add.u64 %d0, %d0, %d2;\nst.global.u8 [%d0], %r0;\nret;\n}\n";

/* In the current context; NULL where that fails. The GIL is held. */
static CUfunction fill_kernel(void)
{
    static struct {
        CUcontext context;
        CUfunction function;
    } known[MOST_CONTEXTS];
    CUcontext context = NULL;
    CUmodule module;
    int i = 0;
    get_context(&context);
    while (i < MOST_CONTEXTS && known[i].context && known[i].context != context)
        i++;
    if (i == MOST_CONTEXTS)
        return NULL;
    if (!known[i].function && load_module(&module, FILL) == CUDA_SUCCESS && get_function(&known[i].function, module, "fill") == CUDA_SUCCESS)
        known[i].context = context;
    return known[i].function;
}

static int read_fill(CUgraphNode from, Chain *chain)
{
    CUDA_MEMSET_NODE_PARAMS filling;
    CUfunction function = fill_kernel();
    if (!function || get_fill(from, &filling) != CUDA_SUCCESS || filling.elementSize != 1 || filling.height != 1)
        return 0;
    if (!filling.width || filling.width > MOST_FILLED)
        return 0;
    const uint64_t parameters[] = {filling.dst, filling.width, filling.value};
    Node *node = chain_node(chain, sizeof(parameters) - sizeof(uint32_t));
    if (!node)
        return 0;
    memcpy(chain->bytes + node->first, parameters, node->size);
    node->kernel = (CUDA_KERNEL_NODE_PARAMS){.func = function, .gridDimX = (filling.width + THREADS - 1) / THREADS, .gridDimY = 1,
                                             .gridDimZ = 1, .blockDimX = THREADS, .blockDimY = 1, .blockDimZ = 1};
    return 1;
}

static int read_graph(CUgraph graph, Chain *chain)
{
    CUgraphNode node[MOST_NODES], before = NULL;
    size_t count = 0, edges;
    if (get_nodes(graph, NULL, &count) != CUDA_SUCCESS || count < 1 || count > MOST_NODES || get_nodes(graph, node, &count) != CUDA_SUCCESS)
        return 0;
    for (size_t i = 0; i < count; i++) {
        CUgraphNodeType type;
        edges = 0;
        if (get_dependencies(node[i], NULL, &edges) != CUDA_SUCCESS || edges != (i > 0))
            return 0;
        if (edges && (get_dependencies(node[i], &before, &edges) != CUDA_SUCCESS || before != node[i - 1]))
            return 0;
        if (get_type(node[i], &type) != CUDA_SUCCESS)
            return 0;
        if (!(type == CU_GRAPH_NODE_TYPE_KERNEL ? read_kernel(node[i], chain) : type == CU_GRAPH_NODE_TYPE_MEMSET && read_fill(node[i], chain)))
            return 0;
    }
    return 1;
}

/* What cuBLAS does with these addresses and so much workspace. */
static int capture_product(const Product *p, void *handle, CUstream stream, const uint64_t *addresses, size_t workspace, Chain *chain)
{
    CUgraph graph = NULL;
    void *given[GIVEN];
    for (int i = 0; i < GIVEN; i++)
        given[i] = (void *)(uintptr_t)addresses[i];
    chain_clear(chain);
    if (p->set_stream(handle, stream) || p->set_workspace(handle, given[WORKSPACE], workspace) || p->set_math_mode(handle, DEFAULT_MATH))
        return 0;
    if (begin_capture(stream, CU_STREAM_CAPTURE_MODE_RELAXED) != CUDA_SUCCESS)
        return 0;
    int status = gemm_of(p, handle, given);
    if (end_capture(stream, &graph) != CUDA_SUCCESS || !graph)
        return 0;
    int read = !status && read_graph(graph, chain);
    graph_destroy(graph);
    return read;
}

/* Whether both do the same, with whatever addresses. */
static int alike(const Chain *x, const Chain *y)
{
    if (x->nodes != y->nodes || x->size != y->size)
        return 0;
    for (Py_ssize_t i = 0; i < x->nodes; i++) {
        const Node *a = &x->node[i], *b = &y->node[i];
        const CUDA_KERNEL_NODE_PARAMS *j = &a->kernel, *k = &b->kernel;
        if (a->size != b->size || j->func != k->func || j->gridDimX != k->gridDimX || j->gridDimY != k->gridDimY || j->gridDimZ != k->gridDimZ ||
            j->blockDimX != k->blockDimX || j->blockDimY != k->blockDimY || j->blockDimZ != k->blockDimZ ||
            j->sharedMemBytes != k->sharedMemBytes || memcmp(a->attribute, b->attribute, sizeof(a->attribute)))
            return 0;
    }
    return 1;
}

/* Which bytes of x are addresses, from y, which does the same with others; 0 if any cannot be told, or a, b or c is not among them. */
static int find_addresses(Chain *x, const Chain *y, uint64_t given[SETS][GIVEN])
{
    int seen = 0;
    for (Py_ssize_t n = 0; n < x->nodes; n++)
        for (size_t i = 0; i + sizeof(uint64_t) <= x->node[n].size; i += sizeof(uint64_t)) {
            size_t byte = x->node[n].first + i;
            uint64_t first, second;
            unsigned memory;
            memcpy(&first, x->bytes + byte, sizeof(first));
            memcpy(&second, y->bytes + byte, sizeof(second));
            if (first == second) {
                if (first >> 32 && pointer_attribute(&memory, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, first) == CUDA_SUCCESS)
                    return 0;
                continue;
            }
            Py_ssize_t address = 0;
            while (address < GIVEN && first - given[0][address] != second - given[1][address])
                address++;
            if (address == GIVEN || !chain_patch(x, n, byte, address, first - given[0][address]))
                return 0;
            seen |= 1 << address;
        }
    return (seen & 7) == 7;
}

static int find_nodes(const Product *p, void *handle, CUstream stream, size_t most, const unsigned *after, Chain *chain, size_t *workspace)
{
    uint64_t given[SETS][GIVEN];
    for (int i = 0; i < SETS; i++)
        for (int j = 0; j < GIVEN; j++)
            given[i][j] = INVENTED[i][j] + (j < WORKSPACE ? after[j] : 0);
    Chain other = {0};
    int found = capture_product(p, handle, stream, given[0], most, chain) && capture_product(p, handle, stream, given[1], most, &other) &&
                alike(chain, &other) && find_addresses(chain, &other, given) && capture_product(p, handle, stream, given[2], most, &other);
    if (found) {
        chain_write(chain, given[2]);
        found = alike(chain, &other) && !memcmp(chain->bytes, other.bytes, chain->size);
    }
    *workspace = 0;
    for (Py_ssize_t i = 0; found && i < chain->patches; i++)
        if (chain->patch[i].address == WORKSPACE)
            *workspace = most;
    for (size_t i = 0; *workspace == most && i < sizeof(WORKSPACES) / sizeof(*WORKSPACES) && WORKSPACES[i] < most; i++)
        if (capture_product(p, handle, stream, given[2], WORKSPACES[i], &other) && alike(chain, &other) &&
            !memcmp(chain->bytes, other.bytes, chain->size))
            *workspace = WORKSPACES[i];
    chain_clear(&other);
    return found;
}

static PyObject *nodes(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *multiply;
    Py_ssize_t most;
    unsigned after[WORKSPACE];
    if (!PyArg_ParseTuple(args, "O!nIII", &PyCFunction_Type, &multiply, &most, &after[0], &after[1], &after[2]))
        return NULL;
    Product *p = PyCapsule_GetPointer(PyCFunction_GET_SELF(multiply), PRODUCT);
    if (!p)
        return NULL;
    void *handle = handle_of(p);
    if (PyErr_Occurred())
        return NULL;
    Chain *chain = calloc(1, sizeof(*chain));
    if (!chain)
        return PyErr_NoMemory();
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED; /* some thread may be capturing */
    CUstream stream;
    size_t workspace = 0;
    int found = 0;
    exchange_capture_mode(&mode);
    if (p->set_stream && p->set_workspace && stream_create(&stream, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS) {
        found = find_nodes(p, handle, stream, most, after, chain, &workspace);
        p->set_stream(handle, NULL);
        stream_destroy(stream);
    }
    exchange_capture_mode(&mode);
    handle_of(p); /* which gives it torch's stream and workspace again */
    if (PyErr_Occurred() || !found) {
        chain_clear(chain);
        free(chain);
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    return Py_BuildValue("Nn", PyCapsule_New(chain, CHAIN, chain_free), (Py_ssize_t)workspace);
}

static PyMethodDef METHODS[] = {
    {"plan", make_plan, METH_VARARGS, "plan(parts, addresses): how to have the GPU do them."},
    {"product", make_product, METH_VARARGS,
     "product(library, handle, device, beta, type, type of c, turned, turned, m, n, k, leading, leading, leading): how to multiply."},
    {"nodes", nodes, METH_VARARGS, "nodes(multiply, most, after, after, after): what cuBLAS has the GPU do."},
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
