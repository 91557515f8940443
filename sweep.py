"""temporary: workers compile in parallel, time one at a time"""
import fcntl, importlib.util, json, os, sys, time, multiprocessing as mp
import re
OUT = os.environ.get("OUT", "/tmp")
def load(name, subs, path="kernels/gemv4.py", wsubs=()):
    src = open(path).read()
    for a, b in subs:
        assert a in src, (name, a)
        src = src.replace(a, b)
    if wsubs:
        w = open("kernels/warp.py").read()
        for a, b in wsubs:
            assert a in w, (name, a)
            w = w.replace(a, b)
        f = f"/tmp/warp_{name}_{os.getpid()}.py"; open(f, "w").write(w)
        spec = importlib.util.spec_from_file_location(f"warp_{name}", f); m = importlib.util.module_from_spec(spec); sys.modules[f"warp_{name}"] = m; spec.loader.exec_module(m)
        src = src.replace("from lora.kernels.warp import", f"from warp_{name} import")
    src = src.replace('"lora::gemv4"', f'"lora::gemv4_{name}"').replace('"lora::down"', f'"lora::down_{name}"')
    f = f"/tmp/v_{name}_{os.getpid()}.py"; open(f, "w").write(src)
    spec = importlib.util.spec_from_file_location(f"v_{name}", f); m = importlib.util.module_from_spec(spec); sys.modules[f"v_{name}"] = m; spec.loader.exec_module(m)
    os.remove(f)
    return m
def graph_ms(call, sets, rep):
    import torch
    from triton.testing import do_bench
    for i in range(min(3, sets)): call(i)
    torch.cuda.synchronize(); g = torch.cuda.CUDAGraph(); n = max(8, sets)
    with torch.cuda.graph(g):
        for i in range(n): call(i % sets)
    return do_bench(g.replay, warmup=5, rep=rep, return_mode="median") / n
def worker(job, lock, cfg):
    try: work(job, lock, cfg)
    except Exception as e:
        import traceback; print("WORKER", job, traceback.format_exc()[-700:], flush=True)
def work(job, lock, cfg):
    sys.path.insert(0, "benchmarks")
    import torch
    from timing import copies
    from lora.quant.weight import quantize_tensor
    from lora.kernels.code4 import Weight4, byte_table
    from lora.kernels.warp import permute_table
    Ns, K, nested = job; torch.manual_seed(0); N = sum(Ns); t0 = time.time()
    nbytes = N * K // 2 + N * K // 64 * (1 if nested else 4); sets = copies(nbytes)
    first = [quantize_tensor((torch.randn(n, K, device="cuda") * 0.02).bfloat16(), "nf4", 64, nested) for n in Ns]
    def w4(p, q=None, s0=None): return Weight4(p.q.view(-1) if q is None else q, p.scales if s0 is None else (s0, *p.scales[1:]), byte_table(p.code), permute_table(p.code), 64, tuple(p.shape))
    ws = [[w4(p) for p in first]] + [[w4(p, p.q.view(-1).clone(), p.scales[0].clone()) for p in first] for _ in range(sets - 1)]
    Wd = torch.cat([p.dequantize() for p in first])
    variants = cfg["variants"](load); cases = []
    xs = {M: torch.randn(M, K, device="cuda").bfloat16() for M in cfg["M"]}
    want = {M: x.double() @ Wd.double().T for M, x in xs.items()}
    base = {M: float(((x.float() @ Wd.bfloat16().float().T).bfloat16().double() - want[M]).norm() / want[M].norm()) for M, x in xs.items()}
    for M in cfg["M"]:
        for vname, mod, plans, check in variants:
            for plan in (plans(N, K, M) if callable(plans) else plans):
                tag = f"{vname} {plan}"
                early = not vname.endswith("-late")
                def call(i, mod=mod, plan=plan, M=M, early=early):
                    mod.plan = lambda *_: plan
                    return torch.cat(mod.gemv4_group(xs[M], ws[i], [None] * len(Ns), [None] * len(Ns), None, early), 1) if len(Ns) > 1 and i < 0 else mod.gemv4_group(xs[M], ws[i], [None] * len(Ns), [None] * len(Ns), None, early)
                try:
                    y = torch.cat(call(0), 1).double(); e = float((y - want[M]).norm() / want[M].norm())
                    same = all(torch.equal(torch.cat(call(0), 1).double(), y) for _ in range(2))
                    ok = not check or (e <= 1.1 * base[M] and same)
                    cases.append((M, tag, call, f"err {e:.4f}/{base[M]:.4f} same {same}", ok))
                except Exception as e: print("CASE", job, M, tag, repr(e)[:300], flush=True)
    tc = time.time() - t0
    with lock:
        rows = {}
        for M, tag, call, err, ok in cases:
            try: ms = graph_ms(call, sets, cfg.get("rep", 25))
            except Exception as e: print("TIME", job, M, tag, repr(e)[:200], flush=True); continue
            rows.setdefault(M, []).append((round(nbytes / ms / 1e6), tag, round(ms, 5), err if not ok else ""))
        for M in rows:
            rows[M].sort(key=lambda r: -r[0])
            print(f"{Ns}x{K} {'nested' if nested else 'plain'} M={M} (compile {tc:.0f}s, bf16err {base[M]:.4f}):")
            for r in rows[M][: cfg.get("top", 12)]: print("    ", *r)
        sys.stdout.flush()
def main(cfg):
    mp.set_start_method("spawn"); lock = mp.Lock()
    ps = [mp.Process(target=worker, args=(j, lock, cfg)) for j in cfg["jobs"]]
    for p in ps: p.start()
    for p in ps: p.join()
