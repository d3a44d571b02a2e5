"""Fetch a model by revision and hash:  python fetch.py FOLDER

What to fetch is in MODEL_REPO, MODEL_REVISION (a commit), MODEL_FILE and MODEL_SHA256; HF_TOKEN is for private models, HF_ENDPOINT for another hub.
Under the file's name there is only ever what has the hash: a server that starts meanwhile waits for it.
"""
import hashlib, os, re, sys
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

def sha256(path):
    "Hash of a file, or None without one"
    if path.exists():
        with open(path, 'rb') as f: return hashlib.file_digest(f, 'sha256').hexdigest()

def settings(env):
    "Repository, commit, file and hash; a branch may move, and is refused"
    repo, revision, file, digest = (env.get(f'MODEL_{k}', '') for k in ('REPO', 'REVISION', 'FILE', 'SHA256'))
    for name,value,pattern in (('MODEL_REVISION', revision, '[0-9a-f]{40}'), ('MODEL_SHA256', digest, '[0-9a-f]{64}')):
        if not re.fullmatch(pattern, value): raise ValueError(f'{name} {value!r} is not {pattern}')
    if not repo or not re.fullmatch(r'[\w-][\w.-]*', file): raise ValueError('MODEL_REPO or MODEL_FILE is missing, or has a folder')
    return repo, revision, file, digest

def download(url, to, token=''):
    "Write what `url` answers; the token goes to no server that it redirects to"
    request = Request(url)
    if token: request.add_unredirected_header('Authorization', f'Bearer {token}')
    with urlopen(request, timeout=60) as r, open(to, 'wb') as f:
        while chunk := r.read(2**20): f.write(chunk)
        f.flush(); os.fsync(f.fileno())

def main(folder, env):
    repo, revision, file, digest = settings(env)
    to, part = Path(folder)/file, Path(folder)/f'.{file}.part'
    if sha256(to) == digest: return print(f'{file} is here, with the right hash')
    to.unlink(missing_ok=True)
    try:
        download(f"{env.get('HF_ENDPOINT') or 'https://huggingface.co'}/{repo}/resolve/{revision}/{file}", part, env.get('HF_TOKEN'))
        if (got := sha256(part)) != digest: raise ValueError(f'{file} of {repo} at {revision} has SHA-256 {got}, not {digest}: nothing is kept')
        part.rename(to); print(f'{file}: {to.stat().st_size:,} bytes, with the right hash')
    finally: part.unlink(missing_ok=True)

if __name__ == '__main__':
    try: main(sys.argv[1], os.environ)
    except (OSError, ValueError, HTTPException) as e: sys.exit(f'cannot fetch the model: {" ".join(str(e).split())}')
