"""A stand-in for the Hugging Face hub on 127.0.0.1: data sets of parquet files for the real clients, with the faults of a real network.

As a program: hub.py FOLDER PORT_FILE [FAULTS as JSON]; FOLDER/OWNER/NAME/FILE is a file of the data set OWNER/NAME.
"""
import hashlib, json, re, socket, struct, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

SHA = 'c0ffee'*6+'c0ff'

class Hub(ThreadingHTTPServer):
    "`faults`: {number of the request for bytes, from 0: 'cut' (dropped half-way), 429 or 503}; `dies_after`: so many are answered"
    daemon_threads = True
    def __init__(self, folder, faults=(), dies_after=None, license='cc0-1.0'):
        super().__init__(('127.0.0.1', 0), Answer)
        self.folder, self.faults, self.dies_after, self.license = Path(folder), dict(faults), dies_after, license
        self.asked, self.log, self.sent, self.lock = 0, [], 0, threading.Lock()
    url = property(lambda self: f'http://127.0.0.1:{self.server_address[1]}')
    def __enter__(self): threading.Thread(target=self.serve_forever, daemon=True).start(); return self
    def __exit__(self, *e): self.shutdown(); self.server_close()

class Answer(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass

    def send(self, code, body=b'', head=(), **more):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.server.log.append((self.command, self.path, code)); self.send_response(code)
        head = {'Content-Length': len(body), 'Content-Type': 'application/json', 'X-Repo-Commit': SHA, **dict(head), **more}
        for k,v in head.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def files(self, repo):
        root = self.server.folder/repo
        return {str(p.relative_to(root)): p for p in sorted(root.rglob('*')) if p.is_file()}

    def entry(self, name, p):
        return dict(type='file', path=name, size=p.stat().st_size, oid=hashlib.sha1(name.encode()).hexdigest())

    def route(self):
        path = unquote(urlparse(self.path).path)
        if m := re.fullmatch(r'/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?', path): return self.info(m[1])
        if m := re.fullmatch(r'/api/datasets/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?', path): return self.tree(m[1], m[2] or '')
        if m := re.fullmatch(r'/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+', path): return self.paths(m[1])
        if m := re.fullmatch(r'/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)', path): return self.content(m[1], m[2])
        self.send(404, dict(error='not found'))
    do_GET = do_HEAD = do_POST = route

    def info(self, repo):
        if not (files := self.files(repo)):
            return self.send(404, dict(error='Repository not found'), [('X-Error-Code', 'RepoNotFound')])
        self.send(200, dict(id=repo, sha=SHA, author=repo.partition('/')[0], private=False, gated=False, disabled=False, tags=[],
                            downloads=0, likes=0, lastModified='2024-01-01T00:00:00.000Z', createdAt='2024-01-01T00:00:00.000Z',
                            cardData=dict(license=self.server.license), siblings=[dict(rfilename=n) for n in files]))

    def tree(self, repo, under):
        files = {n: p for n,p in self.files(repo).items() if not under or n.startswith(under.rstrip('/')+'/')}
        folders = sorted({str(d) for n in files for d in Path(n).parents if str(d) not in ('.', under)})
        self.send(200, [dict(type='directory', path=d, oid='0'*40, size=0) for d in folders]+[self.entry(n, p) for n,p in files.items()])

    def paths(self, repo):
        asked = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode(); files = self.files(repo)
        form = [a.partition('=') for a in asked.split('&')]
        names = json.loads(asked)['paths'] if asked.startswith('{') else [unquote(v) for k,_,v in form if k == 'paths']
        res = [self.entry(n, files[n]) for n in names if n in files]
        folder = lambda n: any(f.startswith(n.rstrip('/')+'/') for f in files)
        res += [dict(type='directory', path=n, oid='0'*40, size=0) for n in names if folder(n)]
        self.send(200, res)

    def content(self, repo, name):
        if not (p := self.files(repo).get(name)): return self.send(404, b'', [('X-Error-Code', 'EntryNotFound')])
        size, span = p.stat().st_size, re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        tag = hashlib.sha1(name.encode()).hexdigest()
        head = {'ETag': f'"{tag}"', 'Accept-Ranges': 'bytes', 'Content-Type': 'application/octet-stream'}
        if self.command == 'HEAD': return self.send(200, b'', head | {'Content-Length': size})
        lo, hi = (int(span[1]), min(int(span[2] or size-1), size-1)) if span else (0, size-1)
        with self.server.lock: number = self.server.asked; self.server.asked += 1
        if self.server.dies_after is not None and number >= self.server.dies_after: return self.drop()
        fault = self.server.faults.get(number)
        if fault in (429, 503): return self.send(fault, dict(error='slow down'), {'Retry-After': 1, 'ratelimit': '"api";r=0;t=1'})
        with open(p, 'rb') as f: f.seek(lo); body = f.read(hi-lo+1)
        if span: head['Content-Range'] = f'bytes {lo}-{hi}/{size}'
        if fault == 'cut':
            self.send_response(206 if span else 200)
            for k,v in (head | {'Content-Length': len(body)}).items(): self.send_header(k, str(v))
            self.end_headers(); self.wfile.write(body[:len(body)//2]); self.wfile.flush(); return self.drop()
        self.server.sent += len(body); self.send(206 if span else 200, body, head)

    def drop(self):
        "The connection ends as when a cable is pulled: by a reset"
        self.server.log.append((self.command, self.path, 'dropped')); self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); self.connection.close()

if __name__ == '__main__':
    told = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    told['faults'] = {int(k): v for k,v in told.get('faults', {}).items()}
    with Hub(sys.argv[1], **told) as hub:
        Path(sys.argv[2]).write_text(hub.url); sys.stdin.read()
