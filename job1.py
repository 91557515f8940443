import sweep
def variants(load):
    cheap = [("""        shl.b32 y, $4, 4; and.b32""", """        xor.b32 $0, $4, $5; xor.b32 $1, $4, $6; xor.b32 $2, $4, $7; xor.b32 $3, $4, $8; }""" + '""",\n        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",\n        [word, low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]],\n        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),\n        is_pure=True,\n        pack=1,\n    )\n\n\n@triton.jit\ndef unused(word, low, high):\n    return tl.inline_asm_elementwise("""{ .reg .b32 y, s, t, m, a, b, l, h;\n        shl.b32 y, $4, 4; and.b32')]
    nox = [("@p ld.global.v4.b32 {$0, $1, $2, $3}, [$8]; @p ld.global.v4.b32 {$4, $5, $6, $7}, [$8+16]; }", "}")]
    v0 = load("v0", [])
    nd = load("nd", [], wsubs=cheap)
    nx = load("nx", [], wsubs=nox)
    def plans(N, K, M):
        U = K // 256
        if U == 16: p = [(1, 4, 4), (1, 3, 4), (1, 2, 4), (1, 2, 8), (1, 1, 8), (1, 1, 16)]
        else: p = [(1, 3, 4), (1, 2, 4), (1, 1, 8)]
        if M == 16: p = p[:1] + p[-2:] + [(2, 1, 4)]
        return p
    one = lambda N, K, M: [plans(N, K, 1)[0], plans(N, K, 1)[-1]] if M == 1 else []
    return [("v0", v0, plans, True), ("v0-late", v0, one, True), ("nodecode", nd, one, False), ("nox", nx, one, False)]
cfg = dict(variants=variants, M=(1, 8, 16), rep=20, top=12, jobs=[((28672,), 8192, True), ((14336,), 4096, True), ((4096,), 14336, True), ((4096,), 4096, True), ((14336,), 4096, False), ((4096, 1024, 1024), 4096, True)])
if __name__ == "__main__":
    import torch
    sys_path = __import__("sys").path; sys_path.insert(0, "benchmarks")
    from timing import copy_gb_s
    print("copy", round(copy_gb_s()), torch.cuda.get_device_name(), flush=True)
    sweep.main(cfg)
