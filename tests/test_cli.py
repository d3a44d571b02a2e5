"The command line as a user meets it: real processes, real signals, real faults."
import json, os, random, shutil, signal, subprocess, sys, time, typing
from pathlib import Path
import forked, pytest
from hypothesis import given, settings, strategies as st
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
    "With an environment of its own it is a new interpreter, which reads that while it starts"
    if not env: return forked.run(*args)
    return subprocess.run(SLM+[str(a) for a in args], capture_output=True, text=True, errors='replace', timeout=1200,
                          env={**os.environ, **env})

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
    r = run('pretrain', '--corpus', 'tinystories', '--steps', 3, '--out', tmp_path/'x', HF_ENDPOINT='http://127.0.0.1:9',
            HF_HUB_OFFLINE='0')
    assert r.returncode == 2 and r.stderr.strip().count('\n') == 0, r.stderr
    assert 'pydocs' in r.stderr and 'files:' in r.stderr


@pytest.fixture(scope='module')
def whole(home, tmp_path_factory):
    "A run that nobody disturbed"
    out = tmp_path_factory.mktemp('runs')/'whole'
    r = run('pretrain', *TINY, '--steps', 30, '--dropout', .1, '--out', out)
    assert r.returncode == 0, r.stderr
    assert 'valid_bpb' in r.stdout
    return out

def start(out, *more):
    return subprocess.Popen(SLM+['pretrain', *TINY, '--steps', '30', '--dropout', '.1', '--save-minutes', '0.001', '--out', str(out),
                                 *more],
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
    p.send_signal(signal.SIGINT); so,se = p.communicate(timeout=600)
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
        wait_for(lambda: (out/'run.json').exists(), p); time.sleep(rng.uniform(.2, 1.5)); p.kill(); p.communicate()
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

# ---- numbers that no training can use

BASES = {v: ['x'] for v in ('sft', 'dpo', 'reward', 'rlhf', 'qlora', 'distill')} | {v: ['--corpus', 'pydocs'] for v in ('pretrain', 'bert')}
NUMBERS = [('--seed', '-1'), ('--seed', 2**64), ('--minutes', 'nan'), ('--minutes', 'inf'), ('--steps', 0), ('--micro-batch', '-1'),
           ('--lr', 'nan'),
           ('--lr', 'inf'), ('--epochs', 'inf'), ('--epochs', 'nan'), ('--bs', 0), ('--max-rows', '-5'), ('--seq-len', '-1')]

@pytest.mark.parametrize('option,value', NUMBERS)
def test_numbers_are_refused_before_a_folder_exists(option, value, tmp_path, capsys, monkeypatch):
    for verb,args in BASES.items():
        if verb in ('pretrain', 'distill', 'bert') and option in ('--epochs', '--bs', '--max-rows'): continue
        err = fails(capsys, monkeypatch, verb, *args, option, value, '--out', tmp_path/'out')
        assert f'{option} must be' in err or 'exactly one of' in err, (verb, err)
        assert not (tmp_path/'out').exists()

def configs():
    from slm.exp.bert import BertConfig
    from slm.train.distill import DistillConfig
    from slm.train.dpo import DPOConfig
    from slm.train.lora import LoRAConfig
    from slm.train.pretrain import PretrainConfig
    from slm.train.reward import RewardConfig
    from slm.train.rlhf import GRPOConfig
    from slm.train.sft import FinetuneConfig, SFTConfig
    return PretrainConfig, DistillConfig, BertConfig, FinetuneConfig, SFTConfig, DPOConfig, LoRAConfig, RewardConfig, GRPOConfig

def kinds(cls): return {k: typing.get_args(v) or (v,) for k,v in typing.get_type_hints(cls).items()}
def numeric(cls): return [k for k,v in kinds(cls).items() if int in v or float in v]

def test_every_number_has_its_range():
    for cls in configs(): assert set(numeric(cls)) <= set(cls.allowed), cls

ODD = st.integers(-2**70, 2**70) | st.floats() | st.none() | st.text(max_size=3) | st.booleans() | st.lists(st.integers(), max_size=1)

@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_asked_of_a_stage_is_sound_or_refused_by_name(data):
    cls = data.draw(st.sampled_from(configs())); kind = kinds(cls); name = data.draw(st.sampled_from(sorted(kind))); value = data.draw(ODD)
    needed = dict(base='b', data='d') if 'base' in kind else dict(teacher='t') if 'teacher' in kind else {}
    try: cls(**needed | {name: value})
    except SLMError as e: assert str(e).startswith(f"--{name.replace('_', '-')} must be"); return
    assert type(value) in kind[name] or type(value) is int and float in kind[name] or type(value) is list
    if name in numeric(cls) and value is not None: assert value >= 0 and (type(value) is float or value < 2**63)

def test_a_home_that_cannot_be_made_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path/'file').write_text(''); monkeypatch.setenv('SLM_HOME', str(tmp_path/'file'/'home'))
    err = fails(capsys, monkeypatch, 'pretrain', '--steps', 3, '--max-bytes', 500_000, '--out', tmp_path/'out')
    assert 'SLM_HOME' in err and not (tmp_path/'out').exists()

# ---- what is killed between the training and the mark

class Killed(BaseException): "Nothing catches it"

SMALL = dict(max_bytes=600_000, vocab_size=512, seq_len=64, batch_tokens=1024, steps=2, evals=1, samples=1,
             model=dict(n_layer=1, d_model=64))

@pytest.mark.parametrize('at', ['report', 'mark', 'deletion'])
def test_killed_after_the_training_it_is_a_finished_run(at, home, tmp_path, monkeypatch):
    from slm.core import RunDir
    from slm.model.pretrained import load_model_and_tokenizer
    from slm.train import pretrain as P, stage as S
    def die(*args, **kwargs): raise Killed
    with monkeypatch.context() as m:
        m.setattr(*dict(report=(S, 'write_report'), mark=(RunDir, 'finish'), deletion=(shutil, 'rmtree'))[at], die)
        with pytest.raises(Killed): P.pretrain('pydocs', tmp_path/'run', save_minutes=1e-9, **SMALL)
    assert RunDir.open(tmp_path/'run').info['status'] == ('done' if at == 'deletion' else 'running')
    assert len(list((tmp_path/'run'/'checkpoints').iterdir())) == 2
    if at == 'deletion':
        with pytest.raises(SLMError, match='finished'): P.resume(tmp_path/'run')
    else: assert P.resume(tmp_path/'run').info['status'] == 'done'
    assert (tmp_path/'run'/'report.md').exists() and not (tmp_path/'run'/'checkpoints').exists()
    load_model_and_tokenizer(tmp_path/'run')

def test_killed_after_the_checkpoint_of_the_last_step(home, tmp_path, monkeypatch):
    from slm.model.gpt import GPT
    from slm.train import pretrain as P
    def die(*args, **kwargs): raise Killed
    with monkeypatch.context() as m:
        m.setattr(GPT, 'save_pretrained', die)
        with pytest.raises(Killed): P.pretrain('pydocs', tmp_path/'run', save_minutes=1e-9, **SMALL)
    assert P.resume(tmp_path/'run').info['status'] == 'done'

def test_a_prompt_longer_than_the_context_does_not_end_a_pretraining(home, tmp_path):
    from slm.train import pretrain as P
    run = P.pretrain('pydocs', tmp_path/'run', prompts=['Return the '*300, 'Return'], **SMALL)
    assert run.info['status'] == 'done' and (run/'samples.md').read_text().count('> **') == 1

def test_a_flipped_bit_of_a_run_and_the_way_around(whole, tmp_path, capsys, monkeypatch):
    bad = shutil.copytree(whole, tmp_path/'bad'); f = bad/'model.safetensors'
    b = bytearray(f.read_bytes()); b[-101] ^= 16; f.write_bytes(b)
    assert 'SHA-256' in fails(capsys, monkeypatch, 'generate', bad, '--prompt', 'a')
    assert run('generate', bad, '--prompt', 'a', '--max-new-tokens', 2, SLM_SKIP_HASHES='1').returncode == 0
    info = json.loads((bad/'run.json').read_text()); del info['hashes']; (bad/'run.json').write_text(json.dumps(info))
    assert run('generate', bad, '--prompt', 'a', '--max-new-tokens', 2).returncode == 0, 'a run of before there were hashes'

# ---- terminals and talks

@pytest.mark.parametrize('verb', ['corpus', 'runs', 'generate', 'chat'])
def test_a_terminal_of_few_characters(verb, whole, tmp_path):
    odd = shutil.copytree(whole, tmp_path/'runs'/'odd'); info = json.loads((odd/'run.json').read_text())
    (odd/'run.json').write_text(json.dumps(info | dict(stage='\u4e2d\u2192')))
    args = dict(corpus=[], runs=[tmp_path/'runs'], generate=[whole, '--prompt', '\u4e2d \u2192', '--max-new-tokens', 4],
                chat=[whole, '--message', '\u4e2d \u2192', '--max-new-tokens', 4])[verb]
    r = run(verb, *args, PYTHONIOENCODING='cp1252', PYTHONUTF8='0')
    assert r.returncode == 0 and 'Traceback' not in r.stderr, r.stderr
    assert verb not in ('runs', 'generate') or '\\u4e2d' in r.stdout, r.stdout

def test_nothing_is_printed_before_a_refusal(whole):
    for bad in (['--prompt', 'Return the '*300], ['--prompt', 'a', '--temperature', '-1']):
        r = CliRunner().invoke(app, ['generate', str(whole), *bad])
        assert isinstance(r.exception, SLMError) and r.stdout == '', r.stdout

def test_one_overlong_message_does_not_end_a_talk(whole):
    r = CliRunner().invoke(app, ['chat', str(whole), '--max-new-tokens', '4', '--seed', '1'], input='Return the '*300+'\nReturn\n\n')
    alone = CliRunner().invoke(app, ['chat', str(whole), '--max-new-tokens', '4', '--seed', '1'], input='Return\n\n')
    assert r.exit_code == 0 and 'the context holds 64: shorten it' in r.output, r.output
    assert r.stdout == alone.stdout and alone.stdout.strip(), r.stdout
    r = CliRunner().invoke(app, ['chat', str(whole), '--message', 'Return the '*300])
    assert isinstance(r.exception, SLMError) and 'shorten it' in str(r.exception)

@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 100 MB, where mounting one is allowed"
    if sys.platform != 'linux' or os.geteuid() != 0: pytest.skip('mounting a small disk needs root on Linux')
    d = tmp_path/'disk'; d.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100m', 'tmpfs', str(d)], capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
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
    so,se = p.communicate(timeout=600)
    assert p.returncode == 2 and se.count('slm: error:') == 1 and 'disk' in se and 'Traceback' not in se, (so, se)
    assert not list(out.rglob('*.tmp'))
    (small_disk/'filler').unlink()
    r = run('resume', out)
    assert r.returncode == 0, r.stderr
    assert same(out, whole)

# ---- experiments

def test_rows_of_an_experiment_in_processes_of_their_own(tmp_path):
    cmd = ('exp', 'distill-world', '--quick', '--out', tmp_path)
    first = run(*cmd, '--jobs', 2)                                               # the student waits for its teacher
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path/'results'/'sweep.json').read_text())['rows']
    assert list(rows) == ['teacher-64', 'by-64-160-1']
    assert all(r['status'] == 'done' and 'excess' in r['metrics'] for r in rows.values())
    again = run(*cmd)                                                            # nothing is left to be trained
    assert again.returncode == 0 and again.stdout == first.stdout

def test_a_row_that_ends_is_one_line(tmp_path):
    (tmp_path/'two').mkdir()
    (tmp_path/'two'/'tokenizer.json').write_text('{}')
    r = run('exp', 'scaling-rates', '--quick', '--out', tmp_path/'two', '--jobs', 2)
    assert r.returncode == 2
    assert r.stderr.strip().splitlines()[-1].startswith('slm: error: ') and 'Traceback' not in r.stderr

def test_every_row_of_every_experiment_can_be_asked(tmp_path):
    "Nothing is trained: options that no stage takes would come to light after hours"
    from slm.exp.sweep import EXPERIMENTS, find_experiment
    from slm.train.stage import find_stage
    find_experiment(None); assert len(EXPERIMENTS) >= 2
    for name,quick in ((n, q) for n in EXPERIMENTS for q in (False, True)):
        sweep = find_experiment(name, quick); assert sweep.rows and sweep.name == name
        for row in sweep.rows: stage = find_stage(sweep.stage_of(row)); stage(stage.Config(**sweep.options(row, tmp_path))).check()
        if quick: assert sum(sweep.options(row, tmp_path)['steps'] for row in sweep.rows) <= 40
