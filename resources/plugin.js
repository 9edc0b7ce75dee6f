'use strict';

// Part of `osls package` and `osls deploy`: builds the functions and packs each into a zip; after a
// deployment, says where everything is.

const { spawnSync } = require('node:child_process');
const crypto = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
// Of osls, which is what deploys.
const { ListObjectsV2Command, PutObjectCommand, S3Client } = require(
  require.resolve('@aws-sdk/client-s3', { paths: [require.resolve('osls')] })
);
const { ZipFile } = require('yazl');
const { publicKeys } = require('./settings.js');

/** The most bytes of one zip: what a cold start has to load. */
const ZIP_BYTES = 6 * 1024 * 1024;

/** What builds the functions: how to ask for its version, the least one, and where it comes from. cargo-lambda 1.9.2 is
 * the first that knows Rust 1.98's linker arguments; it finds zig beside it or as `python3 -m ziglang`. */
const TOOLS = [
  [['cargo', 'lambda', '--version'], [1, 9, 2], 'pip install cargo-lambda==1.9.2'],
];

class Tunnel {
  constructor(serverless, _options, { log }) {
    this.serverless = serverless;
    this.log = log;
    this.hooks = {
      'before:package:createDeploymentArtifacts': () => this.build(),
      'after:aws:package:finalize:mergeCustomProviderResources': () => this.nameRelay(),
      'before:aws:deploy:deploy:uploadArtifacts': () => this.uploadRelay(),
      'after:aws:info:displayStackOutputs': () => this.tell(),
    };
  }

  async build() {
    const { service, serviceDir } = this.serverless;
    const { settings } = service.custom;
    const names = service.getAllFunctions();
    const folder = path.join(serviceDir, 'target', 'lambda');
    const programs = settings.relay === 'none' ? names : [...names, 'relay'];
    if (settings.build === 'cargo-lambda') this.compile(programs, settings, folder);
    for (const name of names) {
      const files = [['bootstrap', path.join(folder, name, 'bootstrap'), 0o100755]];
      if (name === 'authorizer' && settings.jwks) {
        const jwks = path.resolve(serviceDir, settings.jwks);
        publicKeys(jwks);
        files.push(['jwks.json', jwks, 0o100644]);
      }
      const zip = path.join(serviceDir, service.getFunction(name).package.artifact);
      const bytes = await pack(files, zip);
      this.log.info(`${name}: ${bytes} bytes`);
      if (bytes > ZIP_BYTES) throw new Error(`${zip} has ${bytes} bytes, more than ${ZIP_BYTES}`);
    }
  }

  /** Says what is missing or too old before a build that takes minutes. */
  tools() {
    for (const [command, least, help] of TOOLS) {
      const { stdout, error, status } = spawnSync(command[0], command.slice(1), { encoding: 'utf8' });
      const found = /([0-9]+)\.([0-9]+)(?:\.([0-9]+))?/.exec(stdout ?? '');
      if (error || status !== 0 || !found) throw new Error(`${command.join(' ')} does not run: ${help}`);
      const parts = found.slice(1).map((part) => Number(part ?? 0));
      const older = parts.map((part, at) => part - least[at]).find((difference) => difference !== 0) < 0;
      if (older) throw new Error(`${command[0]} ${found[0]} is too old, ${least.join('.')} is needed: ${help}`);
    }
  }

  compile(names, settings, folder) {
    this.tools();
    const target = settings.architecture === 'arm64' ? '--arm64' : '--x86-64';
    const packages = names.flatMap((name) => ['-p', name]);
    const command = ['lambda', 'build', '--release', target, '--locked', '--lambda-dir', folder, ...packages];
    this.log.notice(`cargo ${command.join(' ')}`);
    const { status, error } = spawnSync('cargo', command, {
      cwd: this.serverless.serviceDir,
      stdio: ['ignore', 'inherit', 'inherit'],
    });
    if (error || status !== 0) {
      const help = 'it needs cargo-lambda (pip install cargo-lambda) and the Rust target of the architecture';
      throw new Error(`the functions could not be built: ${help}`);
    }
  }

  /** The program of relay and its hash, where there is a relay. */
  relay() {
    const { service, serviceDir } = this.serverless;
    if (service.custom.settings.relay === 'none') return null;
    const program = content(path.join(serviceDir, 'target', 'lambda', 'relay', 'bootstrap'));
    return { program, hash: crypto.createHash('sha256').update(program).digest('hex') };
  }

  /** Writes the hash of relay's program into its task: only another program makes another task. */
  nameRelay() {
    const relay = this.relay();
    if (!relay) return;
    const { Resources } = this.serverless.service.provider.compiledCloudFormationTemplate;
    for (const variable of Resources.RelayTask.Properties.ContainerDefinitions[0].Environment) {
      if (typeof variable.Value === 'string') variable.Value = variable.Value.replace('PROGRAM_SHA256', relay.hash);
    }
  }

  /** Puts relay's program where its tasks fetch it. Nothing that is there is overwritten or taken away: a task of the
   * version before may start at any time, and the bucket is emptied with the stack. */
  async uploadRelay() {
    const relay = this.relay();
    if (!relay) return;
    const { service } = this.serverless.service;
    const provider = this.serverless.getProvider('aws');
    const Bucket = await provider.getServerlessDeploymentBucketName();
    const Key = `${provider.getDeploymentPrefix()}/${service}/${provider.getStage()}/relay/${relay.hash}`;
    const s3 = new S3Client(await provider.getAwsSdkV3Config());
    const { Contents } = await s3.send(new ListObjectsV2Command({ Bucket, Prefix: Key, MaxKeys: 1 }));
    if (Contents?.length) return;
    this.log.notice(`relay: ${relay.program.length} bytes`);
    await s3.send(new PutObjectCommand({ Bucket, Key, Body: relay.program }));
  }

  /** Agents' address, public address, next command: the outputs of the stack. */
  tell() {
    const info = this.serverless.pluginManager.plugins.find(({ constructor }) => constructor.name === 'AwsInfo');
    const outputs = new Map(
      (info?.gatheredData?.outputs ?? []).map(({ OutputKey, OutputValue }) => [OutputKey, OutputValue])
    );
    for (const name of ['AgentsUrl', 'PublicUrl', 'FrontTarget', 'Next']) {
      if (outputs.has(name)) this.serverless.addServiceOutputSection(name, outputs.get(name));
    }
  }
}

/** What was built. */
function content(file) {
  try {
    return fs.readFileSync(file);
  } catch (error) {
    throw new Error(`${file} cannot be read (${error.code}); build it, or leave --param build=none out`);
  }
}

/** Packs files into a zip that depends on nothing but their content. */
async function pack(files, zip) {
  const archive = new ZipFile();
  for (const [name, file, mode] of files) {
    archive.addBuffer(content(file), name, { mtime: new Date(2000, 0, 1), mode });
  }
  archive.end();
  fs.mkdirSync(path.dirname(zip), { recursive: true });
  await new Promise((resolve, reject) => {
    archive.outputStream.pipe(fs.createWriteStream(zip)).on('close', resolve).on('error', reject);
  });
  return fs.statSync(zip).size;
}

module.exports = Tunnel;
