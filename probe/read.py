import time, os, mmap, sys, torch, tempfile, json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
MB=2**20
print(os.uname(), os.cpu_count(), torch.cuda.get_device_name())
print(open('/proc/mounts').read()[:600])
for d in ('/tmp','/dev/shm'):
    st=os.statvfs(d); print(d, st.f_bavail*st.f_frsize/1e9,'GB free')
t=time.time(); torch.zeros(1,device='cuda'); print('ctx',time.time()-t)
p=Path(tempfile.mkdtemp())/'f'; size=4*1024*MB
x=torch.randint(0,255,(256*MB,),dtype=torch.uint8)
t=time.time()
with p.open('wb') as f:
    for _ in range(16): f.write(x.numpy())
print('write',time.time()-t)
t=time.time()
with p.open('rb') as f:
    while f.read(64*MB): pass
print('plain read 4G', time.time()-t)
t=time.time(); pin=torch.empty(512*MB,dtype=torch.uint8,pin_memory=True); print('pin 512MB',time.time()-t)
dev=torch.empty(512*MB,dtype=torch.uint8,device='cuda')
for _ in range(2):
    torch.cuda.synchronize(); t=time.time(); dev.copy_(pin,non_blocking=True); torch.cuda.synchronize(); print('h2d GB/s',.512*1.048**2/(time.time()-t))
pageable=torch.empty(512*MB,dtype=torch.uint8).fill_(1)
for _ in range(2):
    torch.cuda.synchronize(); t=time.time(); dev.copy_(pageable); torch.cuda.synchronize(); print('h2d pageable GB/s',.512*1.048**2/(time.time()-t))
t=time.time(); pin.copy_(pageable); print('memcpy to pin GB/s (torch threads)',.512*1.048**2/(time.time()-t))
def read_open(a,n,view):
    with p.open('rb',buffering=0) as f:
        f.seek(a); 
        while len(view):
            k=f.readinto(view); view=view[k:]
fd=os.open(p,os.O_RDONLY)
def read_fd(a,n,view):
    while len(view):
        k=os.preadv(fd,[view],a); a+=k; view=view[k:]
fds={}
import threading
loc=threading.local()
def read_own(a,n,view):
    if not hasattr(loc,'fd'): loc.fd=os.open(p,os.O_RDONLY)
    while len(view):
        k=os.preadv(loc.fd,[view],a); a+=k; view=view[k:]
mm=mmap.mmap(fd,size,prot=mmap.PROT_READ)
tm=torch.frombuffer(mm,dtype=torch.uint8)
def read_map(a,n,view):
    torch.frombuffer(view,dtype=torch.uint8).copy_(tm[a:a+n])
pv=memoryview(pin.numpy())
torch.set_num_threads(1)
def bench(name,fn,chunk,threads):
    slots=max(1,min(512*MB//chunk,64))
    t=time.time()
    with ThreadPoolExecutor(threads) as ex:
        list(ex.map(lambda i: fn(i*chunk,chunk,pv[(i%slots)*chunk:(i%slots+1)*chunk]), range(size//chunk)))
    print(f'{name:10s} chunk {chunk//MB:4d} MB threads {threads:3d}: {size/1e9/(time.time()-t):6.2f} GB/s',flush=True)
for fn in (read_fd,read_own,read_open,read_map):
    for chunk,threads in ((16*MB,1),(16*MB,4),(16*MB,8),(4*MB,16),(64*MB,8)):
        try: bench(fn.__name__,fn,chunk,threads)
        except Exception as e: print(fn.__name__,e)
bench('map again',read_map,16*MB,8)
bench('map again',read_map,4*MB,16)
os.unlink(p)
