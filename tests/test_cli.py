"The command line as a user meets it: real processes, real signals, real faults."
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from typer.testing import CliRunner
from slm.cli import app, main
from slm.core import SLMError

SLM = [sys.executable, '-c', 'from slm.cli import main; main()']
TINY = ['--corpus', 'pydocs', '--max-bytes', '600000', '--vocab-size', '512', '--seq-len', '64', '--batch-tokens', '1024']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "One cache for all tests of this file, so that corpus and tokens are built once"
    h = tmp_path_factory.mktemp('home'); old = os.environ.get('SLM_HOME'); os.environ['SLM_HOME'] = str(h)
    yield h
    os.environ.pop('SLM_HOME') if old is None else os.environ.__setitem__('SLM_HOME', old)

def run(*args, **env):
    return subprocess.run(SLM+[str(a) for a in args], capture_output=True, text=True, timeout=240, env={**os.environ, **env})

def fails(capsys, monkeypatch, *args):
    "Call `main` as the console script does; return its one line of standard error"
    monkeypatch.setattr(sys, 'argv', ['slm', *map(str, args)])
    with pytest.raises(SystemExit) as e: main()
    err = capsys.readouterr().err
    assert e.value.code == 2, err
    assert err.count('\n') == 1 and err.startswith('slm: error: ') and 'Traceback' not in err, err
    return err

def weights(path):
    from safetensors.torch import load_file
    return load_file(Path(path)/'model.safetensors')

def same(a, b):
    import torch
    a,b = weights(a),weights(b)
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


VERBS = [c.name or c.callback.__name__ for c in app.registered_commands]

def test_verbs(): assert set('corpus tokenize pretrain resume generate runs demo eval'.split()) <= set(VERBS)

@pytest.mark.parametrize('verb', VERBS)
def test_help_has_an_example(verb):
    r = CliRunner().invoke(app, [verb, '--help'], env={'COLUMNS': '200'})
    assert r.exit_code == 0 and f'Example: slm {verb}' in r.output, r.output

def test_usage_error_is_exit_code_2_without_traceback():
    r = run('pretrain', '--no-such-option')
    assert r.returncode == 2 and 'Traceback' not in r.stderr and '--no-such-option' in r.stderr

def test_starts_without_torch():
    r = subprocess.run([sys.executable, '-X', 'importtime', '-c', 'import slm.cli'], capture_output=True, text=True)
    assert r.returncode == 0 and ' torch\n' not in r.stderr and ' fastai' not in r.stderr


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp('files')
    (d/'empty.txt').write_text('')
    (d/'short.txt').write_text('One short line of text.\n\nAnother line, as short as that.\n')
    for n,word in (('a.md', 'One'), ('b.md', 'Two')): (d/n).write_text(f'{word} short line of text, and no more than that.\n')
    (d/'binary.txt').write_bytes(bytes(range(256))*20)
    return d

BAD = {
    'empty corpus': (['--corpus', 'files:{files}/empty.txt'], 'empty'),
    'glob that matches nothing': (['--corpus', 'files:{files}/*.nothing'], '*.nothing'),
    'binary file': (['--corpus', 'files:{files}/binary.txt'], 'binary.txt'),
    'missing file': (['--corpus', 'files:{files}/gone.txt'], 'gone.txt'),
    'unknown corpus': (['--corpus', 'tinystorys'], 'tinystories'),
    'unknown preset': (TINY+['--preset', '2m'], '2m'),
    'unknown device': (TINY+['--device', 'tpu'], 'tpu'),
    'vocabulary larger than the data allows': (['--corpus', 'files:{files}/*.md', '--vocab-size', '4096'], 'vocab'),
    'one document only': (['--corpus', 'files:{files}/short.txt'], 'short.txt'),
    'context longer than the corpus': (TINY[:6]+['--seq-len', '1000000', '--batch-tokens', '1000000'], '1000000'),
    'preset too large for memory': (TINY+['--preset', '350m', '--micro-batch', '4000', '--batch-tokens', '256000'], 'GiB'),
    'tokenizer that is none': (TINY+['--tokenizer', '{files}/binary.txt'], 'binary.txt'),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(name, home, files, tmp_path, capsys, monkeypatch):
    args,says = BAD[name]; out = tmp_path/'out'
    err = fails(capsys, monkeypatch, 'pretrain', *(a.replace('{files}', str(files)) for a in args), '--steps', 3, '--out', out)
    assert says.lower() in err.lower(), err
    assert not out.exists() or not any(out.iterdir()), 'something half-written was left'
    assert not [p for p in home.rglob('*.tmp')], 'temporary files were left in the cache'

def test_hub_unreachable_names_the_offline_choices(home, tmp_path):
    r = run('pretrain', '--corpus', 'tinystories', '--steps', 3, '--out', tmp_path/'x', HF_ENDPOINT='http://127.0.0.1:9', HF_HUB_OFFLINE='0')
    assert r.returncode == 2 and r.stderr.strip().count('\n') == 0, r.stderr
    assert 'pydocs' in r.stderr and 'files:' in r.stderr


@pytest.fixture(scope='module')
def whole(home, tmp_path_factory):
    "A run that nobody disturbed"
    out = tmp_path_factory.mktemp('runs')/'whole'
    r = run('pretrain', *TINY, '--steps', 60, '--dropout', .1, '--out', out)
    assert r.returncode == 0, r.stderr
    assert 'valid_bpb' in r.stdout
    return out

def start(out, *more):
    return subprocess.Popen(SLM+['pretrain', *TINY, '--steps', '60', '--dropout', '.1', '--save-minutes', '0.001', '--out', str(out), *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def wait_for(cond, p, seconds=120):
    t0 = time.monotonic()
    while not cond():
        assert p.poll() is None, p.communicate()
        assert time.monotonic()-t0 < seconds, 'waited in vain'
        time.sleep(.02)

def test_ctrl_c_saves_and_resume_ends_bit_identical(whole, tmp_path, capsys, monkeypatch):
    out = tmp_path/'cut'; p = start(out)
    wait_for(lambda: any((out/'checkpoints').glob('[0-9]*')), p)
    p.send_signal(signal.SIGINT); so,se = p.communicate(timeout=60)
    assert p.returncode == 130 and f'slm resume {out}' in so, (so, se)
    assert json.loads((out/'run.json').read_text())['status'] == 'interrupted'
    bad = shutil.copytree(out, tmp_path/'bad'); f = sorted((bad/'checkpoints').glob('*/optim.safetensors'))[-1]
    f.write_bytes(f.read_bytes()[:1000])
    assert 'optim.safetensors' in fails(capsys, monkeypatch, 'resume', bad)
    r = run('resume', out)
    assert r.returncode == 0, r.stderr
    assert same(out, whole)

def test_sigkill_loses_nothing(whole, tmp_path):
    out = tmp_path/'killed'; p = start(out)
    wait_for(lambda: len(list((out/'checkpoints').glob('[0-9]*'))) >= 2, p)
    p.kill(); p.communicate()
    r = run('resume', out)
    assert r.returncode == 0, r.stderr
    assert same(out, whole) and not list(out.rglob('*.tmp'))
    rows = (out/'log.csv').read_text().splitlines()
    assert [l.split(',')[0] for l in rows] == [l.split(',')[0] for l in (whole/'log.csv').read_text().splitlines()]

@pytest.mark.slow
def test_killed_at_ten_random_moments(whole, tmp_path):
    "Wherever the kill falls, the resumed run ends bit for bit where the undisturbed one did"
    rng, resumed = random.Random(0), 0
    for k in range(10):
        out = tmp_path/f'killed{k}'; p = start(out)
        wait_for(lambda: (out/'run.json').exists(), p); time.sleep(rng.uniform(.2, 2.5)); p.kill(); p.communicate()
        r = run('resume', out)
        if r.returncode == 2: assert 'no checkpoint yet' in r.stderr or 'finished' in r.stderr, r.stderr; continue
        assert r.returncode == 0, r.stderr
        assert same(out, whole); resumed += 1
    assert resumed >= 5, resumed

def test_run_directory_opens_elsewhere(whole, tmp_path, home):
    "Copied to another place, with no absolute path in it, it still speaks"
    there = shutil.copytree(whole, tmp_path/'there')
    assert str(whole.parent) not in ''.join(p.read_text() for p in there.glob('*.json'))
    r = run('generate', there, '--prompt', 'Return the', '--max-new-tokens', 8, '--temperature', 0)
    assert r.returncode == 0 and r.stdout.startswith('Return the'), r.stderr

def test_damaged_runs_are_named(whole, tmp_path, capsys, monkeypatch):
    bad = shutil.copytree(whole, tmp_path/'bad'); f = bad/'model.safetensors'
    f.write_bytes(f.read_bytes()[:-100])
    assert 'model.safetensors' in fails(capsys, monkeypatch, 'generate', bad, '--prompt', 'a')
    (bad/'run.json').write_text('{"schema": 1}')
    assert 'run.json' in fails(capsys, monkeypatch, 'resume', bad)
    assert 'finished' in fails(capsys, monkeypatch, 'resume', whole)
    assert 'already holds a run' in fails(capsys, monkeypatch, 'pretrain', *TINY, '--steps', 3, '--out', whole)

def test_checkpoint_of_another_tokenizer(whole, tmp_path, capsys, monkeypatch):
    from slm.data.tokenizer import train_bpe
    bad = shutil.copytree(whole, tmp_path/'other')
    train_bpe(['some other text, long enough to merge, long enough to merge']*50, 280).save(bad/'tokenizer.json')
    assert 'tokenizer' in fails(capsys, monkeypatch, 'generate', bad, '--prompt', 'a').lower()

@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 100 MB, where mounting one is allowed"
    if sys.platform != 'linux' or os.geteuid() != 0: pytest.skip('mounting a small disk needs root on Linux')
    d = tmp_path/'disk'; d.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100m', 'tmpfs', str(d)], capture_output=True).returncode: pytest.skip('mounting is not allowed here')
    yield d
    subprocess.run(['umount', '-l', str(d)])

def test_too_small_a_disk_is_said_at_once(home, small_disk):
    (small_disk/'filler').write_bytes(bytes(80*2**20))
    r = run('pretrain', *TINY, '--steps', 20, '--out', small_disk/'run')
    assert r.returncode == 2 and 'disk' in r.stderr and r.stderr.count('\n') == 1, r.stderr
    assert not (small_disk/'run').exists()

def test_disk_that_fills_up_loses_nothing(whole, small_disk):
    out = small_disk/'run'; p = start(out)
    wait_for(lambda: any((out/'checkpoints').glob('[0-9]*')), p)
    with (small_disk/'filler').open('wb') as f:
        try:
            while True: f.write(bytes(2**20)); f.flush()
        except OSError: pass
    so,se = p.communicate(timeout=120)
    assert p.returncode == 2 and se.count('slm: error:') == 1 and 'disk' in se and 'Traceback' not in se, (so, se)
    assert not list(out.rglob('*.tmp'))
    (small_disk/'filler').unlink()
    r = run('resume', out)
    assert r.returncode == 0, r.stderr
    assert same(out, whole)
