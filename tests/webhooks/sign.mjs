// Prints what the libraries of npm sign: { name: fields }, of a body and secrets on standard input.

import { readFileSync } from 'node:fs';
import { sign } from '@octokit/webhooks-methods';
import { Webhook } from 'standardwebhooks';
import Stripe from 'stripe';
import * as svix from 'svix';
import twilio from 'twilio';

const { body, secrets, url, form, now } = JSON.parse(readFileSync(0, 'utf8'));
const at = new Date(now * 1000);
console.log(
  JSON.stringify({
    github: { 'x-hub-signature-256': await sign(secrets.github, body) },
    stripe: {
      'stripe-signature': Stripe.webhooks.generateTestHeaderString({
        payload: body,
        secret: secrets.stripe,
        timestamp: now - 1,
      }),
    },
    standard: {
      'webhook-id': 'msg_js',
      'webhook-timestamp': String(now),
      'webhook-signature': new Webhook(secrets.standard).sign('msg_js', at, body),
    },
    svix: {
      'svix-id': 'msg_svix_js',
      'svix-timestamp': String(now),
      'svix-signature': new svix.Webhook(secrets.standard).sign('msg_svix_js', at, body),
    },
    twilio: { 'x-twilio-signature': twilio.getExpectedTwilioSignature(secrets.twilio, url, form) },
  }),
);
