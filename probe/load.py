import cProfile, pstats, time, torch, sys, tempfile
from pathlib import Path
sys.path.insert(0,'benchmarks')
import bench_load_8b as b
folder=Path(tempfile.mkdtemp()); t=time.time()
b.write(folder,6,4096,32000); print('write',time.time()-t, sum(f.stat().st_size for f in folder.glob('*.safetensors'))/1e9)
import lora
torch.zeros(1,device='cuda')
for i in range(3):
    torch.cuda.synchronize(); t=time.time()
    pr=cProfile.Profile(); pr.enable()
    m=b.ours(folder); torch.cuda.synchronize(); pr.disable()
    print('load',i,time.time()-t); del m
    if i in (0,2): pstats.Stats(pr).sort_stats('tottime').print_stats(14)
import shutil; shutil.rmtree(folder)
