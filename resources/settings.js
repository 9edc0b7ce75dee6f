'use strict';

// The parameters of a deployment: enter what serverless.yml declares and the command line overrides, leave
// checked values, or one sentence that says what to do.

const fs = require('node:fs');
const path = require('node:path');

const RETENTION_DAYS = [
  1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653,
];

const HOST = /^(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?$/;

function fail(name, problem) {
  const error = new Error(`parameter ${name}: ${problem}`);
  // osls prints the stack: the sentence is enough.
  error.stack = error.message;
  throw error;
}

/** One of the values, or an error that names them. */
function oneOf(name, value, values) {
  return values.includes(value) ? value : fail(name, `'${value}' is none of ${values.join(', ')}`);
}

function flag(name, value) {
  return oneOf(name, String(value), ['true', 'false']) === 'true';
}

/** A whole number within its range; `empty` stands for no value. */
function number(name, value, least, most) {
  const text = String(value);
  if (!/^[0-9]{1,9}$/.test(text) || Number(text) < least || Number(text) > most) {
    fail(name, `'${text}' is not a whole number from ${least} to ${most}`);
  }
  return Number(text);
}

function host(name, value) {
  if (!HOST.test(value)) fail(name, `'${value}' is not a host name in lower case`);
}

/** A certificate of ACM in the region where its service looks for it. */
function certificate(name, value, region, reason) {
  const arn = /^arn:[a-z-]+:acm:([a-z0-9-]+):[0-9]{12}:certificate\/.+$/.exec(value);
  if (!arn) fail(name, value ? `'${value}' is not the ARN of an ACM certificate` : `is needed: ${reason}`);
  if (arn[1] !== region) fail(name, `the certificate is in ${arn[1]} and has to be in ${region}: ${reason}`);
}

/** How many letters have to change to make one name of the other. */
function distance(one, other) {
  let row = Array.from({ length: other.length + 1 }, (_, at) => at);
  for (let i = 1; i <= one.length; i++) {
    const next = [i];
    for (let j = 1; j <= other.length; j++) {
      next[j] = Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (one[i - 1] === other[j - 1] ? 0 : 1));
    }
    row = next;
  }
  return row[other.length];
}

/** Refuses a name that serverless.yml does not declare: it would be ignored otherwise. */
function known(given, names) {
  for (const text of [given ?? []].flat()) {
    const name = String(text).split('=')[0];
    if (names.includes(name)) continue;
    const [nearest] = [...names].sort((a, b) => distance(name, a) - distance(name, b));
    fail(name, `is unknown; did you mean ${nearest}?`);
  }
}

const LIMITS = /^(owner|tunnel)_(connections|requests|rate)$|^owner_tunnels$/;

/** The grammar of TUNNEL_LIMITS, as edge/src/limit.rs reads it; resources/limits.json holds both to it. */
function limits(text) {
  for (const part of text.split(',').map((one) => one.trim())) {
    if (part === '') continue;
    const at = part.indexOf('=');
    if (at < 0) fail('limits', `'${part}' is not key=number`);
    const [key, value] = [part.slice(0, at), part.slice(at + 1)];
    const most = key.endsWith('_rate') ? 1_000_000 : 1000;
    if (!/^\+?[0-9]+$/.test(value) || Number(value) < 1 || Number(value) > most) {
      fail('limits', `'${part}' is out of range: 1 to ${most}`);
    }
    if (!LIMITS.test(key)) {
      fail('limits', `'${key}' is none of owner_connections, owner_tunnels, owner_requests, owner_rate, tunnel_connections, tunnel_requests, tunnel_rate`);
    }
  }
  return text;
}

/** How many public requests may hold so many executions, as edge::limit::edge_requests has it; resources/limits.json
 * holds both to it. */
function edgeRequests(executions) {
  return executions - Math.max(4, Math.floor(executions / 4));
}

/** An owner, as proto::id::Owner has it. */
const OWNER = /^[!-~]{1,128}$/;

/** The list of TUNNEL_REVOKED, as functions/authorizer/src/config.rs reads it: with one that it does not take, nobody
 * could connect. */
function revoked(text) {
  if (text === '') return text;
  let list;
  try {
    list = JSON.parse(text);
  } catch {
    // Said below.
  }
  const isList = ([key, value]) =>
    ['token_ids', 'owners'].includes(key) &&
    Array.isArray(value) &&
    value.every((one) => typeof one === 'string' && (key === 'token_ids' || OWNER.test(one)));
  if (list?.constructor !== Object || !Object.entries(list).every(isList)) {
    fail('revoked', `'${text}' is not JSON of the form {"token_ids": ["…"], "owners": ["…"]}`);
  }
  return text;
}

/** The most executions that count as few, and how many Lambda never reserves. */
const FEW_EXECUTIONS = 200;
const UNRESERVED = 10;

/** How long a public client waits by default and at most, by front: CloudFront waits up to 120 s for an origin
 * without being asked for more, an HTTP API 30 s in all. A front that is not here goes by `none`. */
const REPLY_SECS = { none: [60, 270], cloudfront: [55, 115], httpapi: [27, 27], relay: [55, 115] };

/** How much longer than `ingress` CloudFront waits. */
const READ_MARGIN_SECS = 5;

/** The commands that need the keys of agents' tokens; `remove` and `info` do not. */
const WITH_KEYS = ['package', 'deploy'];

/** The longest name of a stage, and with a relay: its balancer's name, tunnel-STAGE-relay, has 32 letters at most. */
const STAGE_LETTERS = 20;
const STAGE_LETTERS_RELAY = 19;

/** How regions outside the partition `aws` begin. The state machines' files name their tasks by ARNs of that partition. */
const OTHER_PARTITIONS = /^(cn|us-gov|us-iso[a-z]*|eu-iso[a-z]*|eusc)-/;

function settings(parameters, { stage, region, root, fronts, command = 'deploy' }) {
  const { domain, hostedZoneId, agentsDomain, jwks, jwksUrl } = parameters;
  if (!/^[a-z][a-z0-9-]*$/.test(stage) || stage.length > STAGE_LETTERS) {
    fail('stage', `'${stage}' is not up to ${STAGE_LETTERS} lower-case letters, digits and hyphens`);
  }
  if (OTHER_PARTITIONS.test(region)) {
    fail('region', `'${region}' is not in the partition aws, and the state machines run in no other`);
  }

  const front = parameters.front || (domain ? 'cloudfront' : 'none');
  oneOf('front', front, [...fronts, 'relay']);
  // The front relay is cloudfront with another origin.
  const frontFile = front === 'relay' ? 'cloudfront' : front;
  const hasRelay = oneOf('websockets', parameters.websockets, ['none', 'relay']) === 'relay' || front === 'relay';
  if (hasRelay && frontFile !== 'cloudfront') {
    const help = 'give domain and certificateArn for the front cloudfront, or leave websockets out';
    fail('websockets', `the front ${front} cannot hand WebSockets to relay: ${help}`);
  }
  if (hasRelay && stage.length > STAGE_LETTERS_RELAY) {
    fail('stage', `'${stage}' has more than ${STAGE_LETTERS_RELAY} letters, and the name of relay's balancer takes no more`);
  }
  const prefixList = parameters.relayPrefixList;
  if (prefixList && !/^pl-[0-9a-f]{8,17}$/.test(prefixList)) {
    fail('relayPrefixList', `'${prefixList}' is not the id of a prefix list`);
  }
  if (!/^[a-z0-9][a-zA-Z0-9./:@_-]*$/.test(parameters.relayImage)) {
    fail('relayImage', `'${parameters.relayImage}' is not the name of an image`);
  }
  if (front === 'none') {
    if (domain) fail('front', 'none serves no domain; leave domain out, or choose another front');
  } else {
    if (!domain) fail('domain', `is needed for the front ${front}`);
    host('domain', domain);
    const [where, reason] =
      frontFile === 'cloudfront'
        ? ['us-east-1', 'CloudFront takes certificates from there only']
        : [region, 'API Gateway takes certificates from its own region'];
    certificate('certificateArn', parameters.certificateArn, where, reason);
  }
  const edge = parameters.wwwAuthenticateArn;
  if (edge && !/^arn:[a-z-]+:lambda:us-east-1:[0-9]{12}:function:[^:]+:[0-9]+$/.test(edge)) {
    fail('wwwAuthenticateArn', 'is not the ARN of a version of a function in us-east-1');
  }
  if (edge && frontFile !== 'cloudfront') fail('wwwAuthenticateArn', `has no place in the front ${front}`);
  const acl = parameters.webAclArn;
  if (acl && !/^arn:[a-z-]+:wafv2:us-east-1:[0-9]{12}:global\/webacl\/[^/]+\/[0-9a-f-]{36}$/.test(acl)) {
    fail('webAclArn', `'${acl}' is not the ARN of a web ACL for CloudFront (scope CLOUDFRONT, made in us-east-1)`);
  }
  if (acl && frontFile !== 'cloudfront') fail('webAclArn', `AWS WAF cannot stand before the front ${front}; it can before cloudfront`);

  if (agentsDomain) {
    host('agentsDomain', agentsDomain);
    const reason = 'API Gateway takes certificates from its own region';
    certificate('agentsCertificateArn', parameters.agentsCertificateArn, region, reason);
  }
  if (hostedZoneId && !/^Z[A-Z0-9]{1,31}$/.test(hostedZoneId)) {
    fail('hostedZoneId', `'${hostedZoneId}' is not the id of a Route 53 zone`);
  }
  const topic = parameters.alarmTopicArn;
  if (topic && !/^arn:[a-z-]+:sns:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]+$/.test(topic)) {
    fail('alarmTopicArn', `'${topic}' is not the ARN of an SNS topic`);
  }

  if (jwksUrl) {
    if (!jwksUrl.startsWith('https://')) fail('jwksUrl', 'is not an https address');
    if (!parameters.tokenIssuer && WITH_KEYS.includes(command)) {
      fail('tokenIssuer', 'is needed with jwksUrl: what the identity provider writes into the claim iss');
    }
  } else if (WITH_KEYS.includes(command)) {
    publicKeys(path.resolve(root, jwks));
  }
  oneOf('tableEncryption', parameters.tableEncryption, ['aws-owned', 'aws-managed']);
  oneOf('build', parameters.build, ['cargo-lambda', 'none']);
  const [usual, most] = REPLY_SECS[front] ?? REPLY_SECS.none;
  const reply =
    parameters.replyTimeoutSecs === '' ? usual : number('replyTimeoutSecs', parameters.replyTimeoutSecs, 1, most);
  const duration = number('responseDurationSecs', parameters.responseDurationSecs, 10, 900);
  if (duration <= reply) fail('responseDurationSecs', `is not longer than replyTimeoutSecs (${reply})`);
  const reserved =
    parameters.reservedForResponse === ''
      ? null
      : number('reservedForResponse', parameters.reservedForResponse, 1, 100_000);
  const reservedConcurrency =
    parameters.reservedConcurrency === ''
      ? null
      : number('reservedConcurrency', parameters.reservedConcurrency, 1, 100_000);
  let inFlight = '';
  if (parameters.executions !== '') {
    const executions = number('executions', parameters.executions, UNRESERVED, FEW_EXECUTIONS);
    let left = executions;
    for (const [name, count] of [['reservedForResponse', reserved], ['reservedConcurrency', reservedConcurrency]]) {
      left -= count ?? 0;
      if (left < UNRESERVED) {
        fail(name, `Lambda reserves nothing of the last ${UNRESERVED} of the account's ${executions} executions`);
      }
    }
    inFlight = String(edgeRequests(executions - (reserved ?? 0)));
  }
  const retention = number('logRetentionDays', parameters.logRetentionDays, 1, 3653);
  const architecture = oneOf('architecture', parameters.architecture, ['arm64', 'x86_64']);
  return {
    front,
    frontFile,
    // A file of resources/relays.
    relay: hasRelay ? 'ecs' : 'none',
    relayFront: String(front === 'relay'),
    relayTakes: front === 'relay' ? 'true' : hasRelay ? "'sec-websocket-key' in request.headers" : 'false',
    relayTasks: String(number('relayTasks', parameters.relayTasks, 1, 100)),
    relayArchitecture: architecture === 'arm64' ? 'ARM64' : 'X86_64',
    relayIngress: relayIngress(prefixList),
    agentsCertificateArn: agentsDomain ? parameters.agentsCertificateArn : { Ref: 'AWS::NoValue' },
    alarmActions: topic ? [topic] : [],
    architecture,
    build: parameters.build,
    // The file goes into the zip of `authorizer`; an empty variable counts as absent.
    jwks: jwksUrl ? '' : jwks,
    jwksFile: jwksUrl ? '' : 'jwks.json',
    jwksUrl,
    keyGeneration: number('keyGeneration', parameters.keyGeneration, 0, 999_999_999),
    logRetentionDays: oneOf('logRetentionDays', retention, RETENTION_DAYS),
    frontGeneration: number('frontGeneration', parameters.frontGeneration, 0, 999_999_999),
    limits: limits(parameters.limits),
    revoked: revoked(parameters.revoked),
    // A variable of a function: text.
    mailboxesKept: String(number('mailboxesKept', parameters.mailboxesKept, 1, 200)),
    // A variable of a function: text.
    replyTimeoutSecs: String(reply),
    readTimeoutSecs: reply + READ_MARGIN_SECS,
    responseDurationSecs: duration,
    streamIdleSecs: String(number('streamIdleSecs', parameters.streamIdleSecs, 0, 900)),
    acceptEncoding: oneOf('acceptEncoding', parameters.acceptEncoding, ['identity', 'pass']),
    unknownLength: oneOf('unknownLength', parameters.unknownLength, ['stream', 'hold']),
    // A file of resources/variables.
    variablesKey: oneOf('variablesKey', parameters.variablesKey, ['own', 'aws']),
    variablesKeyArn:
      parameters.variablesKey === 'own' ? { 'Fn::GetAtt': ['VariablesKey', 'Arn'] } : { Ref: 'AWS::NoValue' },
    webAclArn: acl || { Ref: 'AWS::NoValue' },
    tracing: flag('tracing', parameters.tracing),
    pointInTimeRecovery: flag('pointInTimeRecovery', parameters.pointInTimeRecovery),
    reservedConcurrency,
    reservedForResponse: reserved,
    // A variable of a function: text. Empty counts as absent.
    edgeRequests: inFlight,
    // Of the longest response: what comes near it is cut, or abandoned.
    slowMilliseconds: duration * 950,
  };
}

/** Who reaches the balancer of relay. */
function relayIngress(prefixList) {
  const http = { IpProtocol: 'tcp', FromPort: 80, ToPort: 80 };
  const own = { Description: "From CloudFront's interfaces in this VPC", CidrIp: '10.0.0.0/24', ...http };
  const listed = { Description: 'From CloudFront', SourcePrefixListId: prefixList, ...http };
  return prefixList ? [own, listed] : [own];
}

/** Reads a JWK set, and refuses one that holds a secret. */
function publicKeys(file) {
  let text;
  try {
    text = fs.readFileSync(file, 'utf8');
  } catch (error) {
    if (error.code !== 'ENOENT') throw error;
    fail('jwks', `there is no ${file}; \`agentd keys new\` makes one, and a signing key beside it`);
  }
  let set;
  try {
    set = JSON.parse(text);
  } catch {
    fail('jwks', `${file} is not JSON`);
  }
  if (!Array.isArray(set.keys) || set.keys.length === 0) fail('jwks', `${file} is not a JWK set with keys`);
  if (set.keys.some((key) => 'd' in key || 'k' in key)) fail('jwks', `${file} holds a private key; keep it`);
  return text;
}

module.exports = async ({ options, resolveVariable, resolveConfigurationProperty }) => {
  const declared = await resolveConfigurationProperty(['params', 'default']);
  known(options.param, Object.keys(declared));
  const parameters = {};
  for (const name of Object.keys(declared)) parameters[name] = await resolveVariable(`param:${name}`);
  const root = path.dirname(__dirname);
  const files = fs.readdirSync(path.join(__dirname, 'fronts'));
  return settings(parameters, {
    stage: await resolveVariable('sls:stage'),
    region: options.region || parameters.region,
    root,
    command: process.argv[2],
    fronts: files.filter((file) => file.endsWith('.yml')).map((file) => path.basename(file, '.yml')).sort(),
  });
};
module.exports.settings = settings;
module.exports.known = known;
module.exports.limits = limits;
module.exports.edgeRequests = edgeRequests;
module.exports.publicKeys = publicKeys;
